"""THE table of checkpoints a user can name, pinned to one commit of their repository each.

The original repositories are the default: the publisher's own files, the ones most machines and
mirrors already hold. ``native_repository`` has the same weights converted by others; it is given
as ``owner/name@revision``. Sizes and hashes are those of ``model.safetensors`` at ``revision``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

DEMO: Final = "demo"


@dataclass(frozen=True, slots=True)
class KnownCheckpoint:
    """One published checkpoint; ``weights_bytes`` and ``weights_sha256`` guard copies by hand."""

    name: str
    repository: str
    revision: str
    weights_bytes: int
    weights_sha256: str
    native_repository: str


KNOWN_CHECKPOINTS: Final[tuple[KnownCheckpoint, ...]] = (
    KnownCheckpoint(
        "Florence-2-base",
        "microsoft/Florence-2-base",
        "5ca5edf5bd017b9919c05d08aebef5e4c7ac3bac",
        463_221_266,
        "03075d2d2d2bbd3e180b9ba0afae4aa8563226e2d32911656966e05b2f2ee060",
        "florence-community/Florence-2-base@00921df66db728a9ceb750f5eca43e5c203a2051",
    ),
    KnownCheckpoint(
        "Florence-2-large",
        "microsoft/Florence-2-large",
        "21a599d414c4d928c9032694c424fb94458e3594",
        1_553_563_458,
        "4f38ce741c6b71188fe2b3419a55e11917a8a7b321ae2e63c61da0191b0ebad7",
        "florence-community/Florence-2-large@4271c66b88cdbc05735372ec13b2360108de5317",
    ),
    KnownCheckpoint(
        "Florence-2-base-ft",
        "microsoft/Florence-2-base-ft",
        "f6c1a25888ffc1d945ee8a1a77ac833c7303d46e",
        463_221_266,
        "58757d657ff44051314c8030b68e04cb1bb618ca9a4885418f111f6fb708185a",
        "florence-community/Florence-2-base-ft@0b03b6f15a4a211370fb204aee4e7dd48887ea37",
    ),
    KnownCheckpoint(
        "Florence-2-large-ft",
        "microsoft/Florence-2-large-ft",
        "4a12a2b54b7016a48a22037fbd62da90cd566f2a",
        1_540_980_506,
        "8b4e610c952eef90a836c56cda0f398a672a3a6ca7b4d96b0e09a86dee42e2c3",
        "florence-community/Florence-2-large-ft@26b734a54fdfbf9c398351eedfabb7f27fc470b7",
    ),
)

KNOWN_BY_NAME: Final = {known.name: known for known in KNOWN_CHECKPOINTS}
CHECKPOINT_NAMES: Final[tuple[str, ...]] = (*KNOWN_BY_NAME, DEMO)
