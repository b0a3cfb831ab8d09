"""Many machines: shards of images, labeled on a Ray cluster, each committed once."""
