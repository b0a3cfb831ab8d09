"""Our own definition of the Florence-2 network."""
