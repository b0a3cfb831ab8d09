"""What a request may say: typed, checked, and written out as the settings file."""

from serve.settings.dump import raw_settings
from serve.settings.model import Reference, Settings, Tiling
from serve.settings.parse import parse_settings

__all__ = ["Reference", "Settings", "Tiling", "parse_settings", "raw_settings"]
