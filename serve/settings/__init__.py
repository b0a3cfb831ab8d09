"""What a request may say: typed, checked, and written out as the settings file."""

from serve.settings.errors import shown
from serve.settings.schema import (
    BOX_SUFFIX,
    Reference,
    Settings,
    changed_settings,
    check_placement,
    has_sliding_window,
    is_for_one_class,
    is_form_for_masks,
    parse_settings,
    raw_settings,
    with_own,
)
from serve.settings.values import (
    Prompt,
    Tiling,
    classes_of,
    join_classes,
    prompts_of,
    split_phrases,
)

__all__ = [
    "BOX_SUFFIX",
    "Prompt",
    "Reference",
    "Settings",
    "Tiling",
    "changed_settings",
    "check_placement",
    "classes_of",
    "has_sliding_window",
    "is_for_one_class",
    "is_form_for_masks",
    "join_classes",
    "parse_settings",
    "prompts_of",
    "raw_settings",
    "shown",
    "split_phrases",
    "with_own",
]
