"""The tokens Florence-2 adds to BART's vocabulary, in the published order.

With BART's 50265 base tokens the first added one is 50265, ``<loc_0>`` is 50269 and ``<image>``
(native layout only) is 51289. Source: the original processor's ``tokens_to_add``.
"""

from __future__ import annotations

from typing import Final

NUM_LOCATION_BINS: Final = 1000

BOS: Final = "<s>"
PAD: Final = "<pad>"
EOS: Final = "</s>"
UNK: Final = "<unk>"
MASK: Final = "<mask>"
IMAGE: Final = "<image>"

BOS_ID: Final = 0
PAD_ID: Final = 1
EOS_ID: Final = 2
DECODER_START_ID: Final = EOS_ID
ANSWER_PREFIX: Final = (DECODER_START_ID, BOS_ID)
"""What every answer begins with: the second one is forced."""

SEPARATOR: Final = "<sep>"
POLYGON_START: Final = "<poly>"
POLYGON_END: Final = "</poly>"
AND: Final = "<and>"


def location_token(location_bin: int) -> str:
    """The token of one of the 1000 location bins."""
    return f"<loc_{location_bin}>"


ADDED_TOKENS: Final[tuple[str, ...]] = (
    "<od>",
    "</od>",
    "<ocr>",
    "</ocr>",
    *(location_token(location_bin) for location_bin in range(NUM_LOCATION_BINS)),
    "<cap>",
    "</cap>",
    "<ncap>",
    "</ncap>",
    "<dcap>",
    "</dcap>",
    "<grounding>",
    "</grounding>",
    "<seg>",
    "</seg>",
    SEPARATOR,
    "<region_cap>",
    "</region_cap>",
    "<region_to_desciption>",
    "</region_to_desciption>",
    "<proposal>",
    "</proposal>",
    POLYGON_START,
    POLYGON_END,
    AND,
)
