"""The ``florence2`` command."""
