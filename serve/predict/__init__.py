"""From images and settings to annotations; knows nothing of HTTP."""
