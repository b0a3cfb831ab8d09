"""From a name to verified files, and from these to a network with its weights."""
