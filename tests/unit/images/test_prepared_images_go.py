"""Whatever is done with a preparer, and by however many, it holds no image afterwards."""

from __future__ import annotations

import gc
import random
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from preparing_tools import PATIENCE_S, SIZE_WH, picture, take, take_ahead, take_also

from florence2.engine.encoding import PreparedImage
from florence2.images import LoadedImage
from florence2.pixels import ImageProcessor


def take_twice(preparer, image):
    preparer.ahead([image])
    preparer.take(image)
    return preparer.take(image)


def forget_ahead(preparer, image):
    preparer.ahead([image])
    preparer.ahead([])


def close(preparer, image):
    preparer.ahead([image])
    preparer.close()


WAYS = [take, take_ahead, take_also, take_twice, forget_ahead, close]


@pytest.mark.parametrize("state", ["idle", "busy"])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_held_afterwards(way, state, make, processor, request):
    preparer = request.getfixturevalue("busy") if state == "busy" else make()
    if state == "busy" and way is close:
        processor.gates[99].opened.set()
    image = picture()
    held = weakref.ref(image)
    pixels = weakref.ref(image.image)
    prepared = way(preparer, image)
    scaled = None if prepared is None else weakref.ref(prepared.scaled)
    del image, prepared
    if state == "idle":
        # A helper that had begun what is forgotten lets go of it when it is done.
        preparer.close()
    gc.disable()
    try:
        assert held() is None
        assert pixels() is None
        assert scaled is None or scaled() is None
    finally:
        gc.enable()


def test_many_threads_each_get_their_own_image(make):
    preparer, images = make(threads=3, max_ahead=5), [picture(20 + n) for n in range(12)]
    expected = [ImageProcessor(size_wh=SIZE_WH).resize(image.image) for image in images]

    def ask(seed):
        dice = random.Random(seed)
        for _ in range(60):
            number = dice.randrange(len(images))
            image = LoadedImage(images[number].image) if dice.random() < 0.3 else images[number]
            way = dice.choice([take, take_ahead, take_also, take_twice, forget_ahead])
            prepared = way(preparer, image)
            assert prepared is None or isinstance(prepared, PreparedImage)
            assert prepared is None or np.array_equal(prepared.scaled, expected[number])

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(ask, seed) for seed in range(8)]:
            done.result(PATIENCE_S)
    preparer.ahead([])
    assert preparer._jobs == {}
