"""Refreshing: every file is hashed again, and an unpinned repository may have moved."""

from __future__ import annotations

from hub_files import REPOSITORY, files, folder_of

from florence2.checkpoint.catalog import resolve


def test_a_damaged_file_of_the_right_length_is_fetched_again(hub, cache):
    folder = resolve(REPOSITORY, cache_dir=cache).folder
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert resolve(REPOSITORY, cache_dir=cache).folder == folder
    assert weights.read_bytes() != whole
    hub.served.clear()
    resolve(REPOSITORY, cache_dir=cache, refresh=True)
    assert weights.read_bytes() == whole
    assert {served.file for served in hub.served} == {"model.safetensors"}


def test_an_unpinned_repository_that_has_moved_is_followed(hub, cache):
    first = resolve(REPOSITORY, cache_dir=cache)
    hub.add(REPOSITORY, files(**{"config.json": b'{"vision_config": {"dim_embed": [2]}}'}))
    refreshed = resolve(REPOSITORY, cache_dir=cache, refresh=True)
    assert refreshed.revision == hub.repositories[REPOSITORY].commit != first.revision
    assert refreshed.folder == folder_of(hub, cache)
    assert resolve(REPOSITORY, cache_dir=cache).revision == refreshed.revision


def test_without_a_connection_what_is_here_stays(hub, cache, monkeypatch):
    first = resolve(REPOSITORY, cache_dir=cache)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert resolve(REPOSITORY, cache_dir=cache, refresh=True) == first
    assert resolve(REPOSITORY, cache_dir=cache, refresh=True, offline=True) == first
