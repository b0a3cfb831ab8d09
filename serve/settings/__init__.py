"""What a request may say: typed, checked, and written out as the settings file."""
