"""The feature cache: bounded in bytes, least recently used first out."""

from __future__ import annotations

import torch

from florence2.engine.encoding import EncodedImage, FeatureCache


def encoded(key, num_bytes):
    return EncodedImage(torch.zeros(num_bytes, dtype=torch.uint8), (4, 3), key)


def test_the_least_recently_used_image_is_dropped_first():
    cache = FeatureCache(300)
    for key in "abc":
        cache.put(encoded(key, 100))
    assert cache.get("a") is not None
    cache.put(encoded("d", 100))
    assert cache.get("b") is None
    assert all(cache.get(key) is not None for key in "acd")


def test_the_cache_never_holds_more_than_its_bytes():
    cache = FeatureCache(250)
    for number in range(50):
        cache.put(encoded(str(number), 1 + 7 * number))
        assert cache.num_bytes <= 250


def test_an_image_larger_than_the_cache_is_not_kept():
    cache = FeatureCache(10)
    cache.put(encoded("a", 5))
    cache.put(encoded("big", 11))
    assert cache.get("big") is None
    assert cache.get("a") is not None


def test_the_same_key_again_counts_once():
    cache = FeatureCache(100)
    cache.put(encoded("a", 60))
    cache.put(encoded("a", 70))
    assert cache.num_bytes == 70
    cache.clear()
    assert cache.num_bytes == 0
