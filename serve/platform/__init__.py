"""Work on the platform's own images: runs over many of them, and their existing labels."""
