"""The one door to OpenCV, whose wheel needs system libraries that slim machines lack."""

from __future__ import annotations

from florence2.errors import naming_libraries

with naming_libraries():
    import cv2

__all__ = ["cv2"]
