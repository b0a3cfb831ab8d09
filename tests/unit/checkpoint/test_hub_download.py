"""Downloads with the real client from a hub on localhost: whole, broken off, damaged, refused."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from hub_files import (
    NO_WEIGHTS,
    NOWHERE,
    REPOSITORY,
    WEIGHTS,
    damage,
    failure,
    files,
    folder_of,
    weights,
)
from huggingface_hub import hf_hub_download

from florence2.checkpoint import catalog
from florence2.checkpoint.catalog import KnownCheckpoint, resolve
from florence2.checkpoint.hub import ProgressUpdate

NEEDED = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    WEIGHTS,
)
MANIFEST = "florence2-manifest.json"


def test_only_needed_files_arrive_whole(hub, cache):
    found = resolve(REPOSITORY, cache_dir=cache)
    assert found.files == NEEDED
    assert found.folder == folder_of(hub, cache)
    assert (found.revision, found.source) == (hub.repositories[REPOSITORY].commit, "hub")
    published = hub.repositories[REPOSITORY].files
    for name in NEEDED:
        assert (found.folder / name).read_bytes() == published[name]
    assert {path.name for path in found.folder.iterdir()} == {*NEEDED, MANIFEST}
    assert {served.file for served in hub.served} == set(NEEDED)


def test_second_time_asks_nothing(hub, cache):
    first = resolve(REPOSITORY, cache_dir=cache)
    hub.requests.clear()
    assert resolve(REPOSITORY, cache_dir=cache) == first
    assert hub.requests == []


def test_later_loads_stay_on_the_first_commit(hub, cache):
    first = resolve(REPOSITORY, cache_dir=cache)
    hub.add(REPOSITORY, files(**{"config.json": b'{"new": 1}'}))
    assert resolve(REPOSITORY, cache_dir=cache).revision == first.revision
    newer = hub.repositories[REPOSITORY].commit
    assert resolve(f"{REPOSITORY}@{newer}", cache_dir=cache).revision == newer
    assert resolve(REPOSITORY, cache_dir=cache).revision == first.revision


def test_progress_grows_to_the_total(hub, cache):
    updates: list[ProgressUpdate] = []
    found = resolve(REPOSITORY, cache_dir=cache, progress=updates.append)
    total = sum((found.folder / name).stat().st_size for name in found.files)
    counts = [update.done_bytes for update in updates]
    assert counts == sorted(set(counts))
    assert counts[-1] == total
    assert {update.total_bytes for update in updates} == {total}
    assert len([u for u in updates if u.file == WEIGHTS]) >= 3


def test_broken_connection_goes_on_by_range(hub, cache):
    size = len(hub.repositories[REPOSITORY].files[WEIGHTS])
    hub.faults.cut(WEIGHTS, after=1_500_000)
    updates: list[ProgressUpdate] = []
    found = resolve(REPOSITORY, cache_dir=cache, progress=updates.append)
    first, second = hub.gets(WEIGHTS)
    assert first.start == 0
    assert 0 < second.start <= first.sent
    assert second.sent == size - second.start
    assert (found.folder / WEIGHTS).stat().st_size == size
    counts = [update.done_bytes for update in updates]
    assert counts == sorted(set(counts))


def test_next_run_resumes_what_the_last_one_left(hub, cache):
    size = len(hub.repositories[REPOSITORY].files[WEIGHTS])

    def stop(update: ProgressUpdate) -> None:
        if update.done_bytes > 1_500_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve(REPOSITORY, cache_dir=cache, progress=stop)
    folder = folder_of(hub, cache)
    have = (folder / "model.safetensors.part").stat().st_size
    assert have > 1_000_000
    assert not (folder / MANIFEST).exists()
    resolve(REPOSITORY, cache_dir=cache)
    assert [(served.start, served.sent) for served in hub.gets(WEIGHTS)] == [
        (0, size),
        (have, size - have),
    ]
    assert all(len(hub.gets(name)) == 1 for name in NEEDED[:-1])


def test_server_without_ranges_starts_over(hub, cache):
    hub.faults.cut(WEIGHTS, after=1_500_000)
    hub.faults.ignores_ranges = True
    resolve(REPOSITORY, cache_dir=cache)
    assert [served.start for served in hub.gets(WEIGHTS)] == [0, 0]


def test_connection_that_never_holds_says_how_far_it_got(hub, cache):
    hub.faults.cut(WEIGHTS, after=100, times=1000)
    sentence = failure(cache_dir=cache)
    assert WEIGHTS in sentence
    assert "of 3.0 MB" in sentence
    assert "run the same command again" in sentence
    assert not (folder_of(hub, cache) / MANIFEST).exists()


def test_damaged_file_is_fetched_once_more(hub, cache):
    hub.faults.corrupt_left[WEIGHTS] = 1
    hub.faults.corrupt_left["tokenizer.json"] = 1
    found = resolve(REPOSITORY, cache_dir=cache)
    published = hub.repositories[REPOSITORY].files
    assert (found.folder / WEIGHTS).read_bytes() == published[WEIGHTS]
    assert len(hub.gets(WEIGHTS)) == len(hub.gets("tokenizer.json")) == 2


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_file_damaged_twice_is_named_and_removed(hub, cache, name):
    hub.faults.corrupt_left[name] = 2
    sentence = failure(cache_dir=cache)
    assert name in sentence
    assert "does not have the published hash" in sentence
    folder = folder_of(hub, cache)
    assert not list(folder.glob(f"{name}*"))
    assert not (folder / MANIFEST).exists()


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, None, "HF_TOKEN"),
        (403, None, "HF_TOKEN"),
        (403, "GatedRepo", "accept its terms"),
        (404, "RepoNotFound", "is not found"),
        (400, None, "HTTP 400"),
        (503, None, "try again later"),
    ],
)
def test_refusals_are_one_sentence(hub, cache, status, code, words):
    hub.faults.status, hub.faults.error_code = status, code
    sentence = failure(cache_dir=cache)
    if status < 500:
        assert words in sentence
        assert REPOSITORY in sentence
    else:
        assert "is not on this machine" in sentence
    assert hub.endpoint in sentence


def test_unknown_repository_and_revision(hub, cache):
    assert "nobody/nothing" in failure("nobody/nothing", cache_dir=cache)
    assert "no revision 'v9'" in failure(f"{REPOSITORY}@v9", cache_dir=cache)


def test_file_refused_after_listing(hub, cache):
    hub.faults.file_status[WEIGHTS] = 403
    assert "HTTP 403" in failure(cache_dir=cache)
    assert not (folder_of(hub, cache) / MANIFEST).exists()


def test_answer_that_is_not_a_hubs(hub, cache):
    hub.faults.not_json = True
    assert "cannot be reached" in failure(cache_dir=cache)
    hub.faults.not_json, hub.faults.no_hashes = False, True
    assert "nothing can be verified" in failure(cache_dir=cache)


def test_token_goes_along(hub, cache, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    resolve(REPOSITORY, cache_dir=cache)
    assert all(served.had_token for served in hub.served)


def test_large_files_from_another_host_resume_and_get_no_token(hub, cache, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    hub.faults.large_elsewhere = True
    hub.faults.cut(WEIGHTS, after=1_500_000)
    resolve(REPOSITORY, cache_dir=cache)
    first, second = hub.gets(WEIGHTS)
    assert 0 < second.start <= first.sent
    assert not first.had_token
    assert not second.had_token
    assert hub.gets("config.json")[0].had_token


def test_no_room(hub, cache, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    sentence = failure(cache_dir=cache)
    assert "make room" in sentence
    assert hub.served == []


def test_disk_full_while_writing(hub, cache, monkeypatch):
    open_file = Path.open

    def full(path: Path, *options: object, **named: object) -> object:
        if path.suffix == ".part" and "b" in str(options):
            raise OSError(28, "No space left on device")
        return open_file(path, *options, **named)

    monkeypatch.setattr(Path, "open", full)
    assert "disk" in failure(cache_dir=cache)


def test_cache_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be stored" in failure(cache_dir=tmp_path / "file")


def test_repository_without_weights(hub, cache):
    hub.add("a/none", files(**NO_WEIGHTS))
    assert "holds no weights" in failure("a/none", cache_dir=cache)
    hub.add("a/lora", files(**NO_WEIGHTS, **{"adapter_model.safetensors": weights(9)}))
    assert "without adapter_config.json" in failure("a/lora", cache_dir=cache)
    assert hub.served == []


def test_an_adapter_is_downloaded_with_its_base(hub, cache):
    config = json.dumps({"base_model_name_or_path": REPOSITORY, "revision": None}).encode()
    adapter = {"adapter_config.json": config, "adapter_model.safetensors": weights(9)}
    commit = hub.add("a/lora", adapter).commit
    found = resolve("a/lora", cache_dir=cache)
    assert (found.revision, found.files) == (commit, tuple(adapter))
    assert found.base is not None
    assert found.base == resolve(REPOSITORY, cache_dir=cache)
    assert resolve("a/lora", cache_dir=cache, offline=True) == found


def test_pickled_weights_only_without_safetensors(hub, cache):
    hub.add("a/old", files(**{WEIGHTS: None, "pytorch_model.bin": b"\x80" * 20_000}))
    assert resolve("a/old", cache_dir=cache).files[-1] == "pytorch_model.bin"


def test_weights_in_shards(hub, cache):
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.dumps({"weight_map": dict(zip("ab", names, strict=True))}).encode()
    shards = {name: weights(20_000, seed) for seed, name in enumerate(names)}
    hub.add(
        "a/shards",
        files(**{WEIGHTS: None, "model.safetensors.index.json": index, **shards}),
    )
    found = resolve("a/shards", cache_dir=cache)
    assert found.files[-3:] == ("model.safetensors.index.json", *names)


def test_file_in_the_clients_own_cache_is_not_fetched_again(hub, cache):
    hf_hub_download(REPOSITORY, WEIGHTS, endpoint=hub.endpoint)
    assert len(hub.gets(WEIGHTS)) == 1
    found = resolve(REPOSITORY, cache_dir=cache)
    assert len(hub.gets(WEIGHTS)) == 1
    content = hub.repositories[REPOSITORY].files[WEIGHTS]
    assert (found.folder / WEIGHTS).read_bytes() == content


@pytest.mark.parametrize("options", [{"verify": "full"}, {"refresh": True}], ids=str)
def test_a_damaged_file_of_the_right_length_is_fetched_again_when_asked(hub, cache, options):
    found = resolve(REPOSITORY, cache_dir=cache)
    path = found.folder / WEIGHTS
    damage(path)
    hub.served.clear()
    assert resolve(REPOSITORY, cache_dir=cache) == found
    assert hub.served == []
    resolve(REPOSITORY, cache_dir=cache, **options)
    assert [served.file for served in hub.served] == [WEIGHTS]
    assert path.read_bytes() == hub.repositories[REPOSITORY].files[WEIGHTS]


def test_refreshing_follows_an_unpinned_repository_that_has_moved(hub, cache):
    first = resolve(REPOSITORY, cache_dir=cache)
    hub.add(REPOSITORY, files(**{"config.json": b'{"vision_config": {"dim_embed": [2]}}'}))
    refreshed = resolve(REPOSITORY, cache_dir=cache, refresh=True)
    assert refreshed.revision == hub.repositories[REPOSITORY].commit != first.revision
    assert refreshed.folder == folder_of(hub, cache)
    assert resolve(REPOSITORY, cache_dir=cache).revision == refreshed.revision


def test_refreshing_without_a_connection_keeps_what_is_here(hub, cache, monkeypatch):
    first = resolve(REPOSITORY, cache_dir=cache)
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    assert resolve(REPOSITORY, cache_dir=cache, refresh=True) == first
    assert resolve(REPOSITORY, cache_dir=cache, refresh=True, offline=True) == first


def test_known_name_refuses_other_weights(hub, cache, monkeypatch):
    commit = hub.repositories[REPOSITORY].commit
    known = KnownCheckpoint("Florence-2-base", REPOSITORY, commit, 1, "0" * 64)
    monkeypatch.setitem(catalog.KNOWN_BY_NAME, "Florence-2-base", known)
    sentence = failure("Florence-2-base", cache_dir=cache)
    assert "other weights for Florence-2-base" in sentence
    assert hub.served == []


def test_cache_folder_from_the_environment(hub, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("FLORENCE2_CACHE", str(tmp_path / "elsewhere"))
    assert resolve(REPOSITORY).folder.is_relative_to(tmp_path / "elsewhere")
