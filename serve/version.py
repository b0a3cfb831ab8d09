"""The version of the app, its image and its package."""

from typing import Final

VERSION: Final = "2.1.0"
