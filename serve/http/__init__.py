"""The app over HTTP: what the SDK's server lacks, and guards around what it has."""
