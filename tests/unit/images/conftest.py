"""A preparer with a processor that can be held up, and one whose helper is held up."""

from __future__ import annotations

import pytest
from preparing_tools import PATIENCE_S, Gate, Watched, picture

from florence2.engine.encoding import Preparer


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


@pytest.fixture
def busy(make, processor):
    """A preparer whose one helper is busy with another image until the gate opens."""
    processor.gates[99] = Gate()
    preparer = make(threads=1, max_ahead=3)
    preparer.ahead([picture(99)])
    assert processor.gates[99].begun.wait(PATIENCE_S)
    return preparer
