"""A budget of pixels, and a preparer whose processor can be held up."""

from __future__ import annotations

import pytest
from image_tools import Watched

from florence2.budget import Budget
from florence2.engine.encoding import Preparer


@pytest.fixture
def budget():
    return Budget(10_000, "pixels")


@pytest.fixture
def processor():
    return Watched()


@pytest.fixture
def make(processor):
    made = []

    def maker(**options):
        made.append(Preparer(processor, **options))
        return made[-1]

    yield maker
    for gate in processor.gates.values():
        gate.opened.set()
    for preparer in made:
        preparer.close()
