"""The one door to the Supervisely SDK.

Importing the SDK switches Pillow to accepting damaged files for the whole process: half an image
would then be labeled as if it were whole. Importing it from here switches that back.
"""

from __future__ import annotations

from PIL import ImageFile

from florence2.errors import naming_libraries

with naming_libraries():
    import supervisely as sly
    from supervisely.annotation.label import LabelingStatus

ImageFile.LOAD_TRUNCATED_IMAGES = False

__all__ = ["LabelingStatus", "sly"]
