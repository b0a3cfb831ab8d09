"""Encode once, ask many: what every way to ask the model shares."""
