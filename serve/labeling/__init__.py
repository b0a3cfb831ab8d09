"""Labeling a folder of images into a project on disk, with no platform at all."""
