"""The app over the engine: the platform, the command line, projects on disk."""
