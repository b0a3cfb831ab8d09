"""Machines without a hub, and folders placed by hand: whole ones work, others say what is amiss."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from hub_files import (
    NO_WEIGHTS,
    NOWHERE,
    REPOSITORY,
    WEIGHTS,
    damage,
    failure,
    folder_of,
    place,
    weights,
)

from florence2.checkpoint import catalog
from florence2.checkpoint.catalog import (
    CHECKPOINT_NAMES,
    KNOWN_CHECKPOINTS,
    KnownCheckpoint,
    resolve,
)
from florence2.checkpoint.files import weight_files
from florence2.checkpoint.hub import is_offline


@pytest.fixture
def known(hub, monkeypatch) -> KnownCheckpoint:
    """One of the four names, with the stand-in's weights as the published ones."""
    content = weights()
    known = KnownCheckpoint(
        "Florence-2-base",
        REPOSITORY,
        hub.repositories[REPOSITORY].commit,
        len(content),
        hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setitem(catalog.KNOWN_BY_NAME, known.name, known)
    return known


@pytest.mark.parametrize("way", ["argument", "unreachable"])
def test_complete_folder_works_without_a_hub(hub, cache, monkeypatch, way):
    first = resolve(REPOSITORY, cache_dir=cache)
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    offline = True if way == "argument" else None
    assert resolve(REPOSITORY, cache_dir=cache, offline=offline) == first
    assert resolve(REPOSITORY, cache_dir=cache, offline=offline, verify="full") == first


def test_offline_follows_the_environment(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert not is_offline(None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert is_offline(None)
    assert not is_offline(False)


def test_nothing_here_and_no_hub(hub, cache, monkeypatch):
    assert "switched off (HF_HUB_OFFLINE)" in failure(cache_dir=cache, offline=True)
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    sentence = failure(cache_dir=cache)
    assert NOWHERE in sentence
    assert "by hand into" in sentence
    sentence = failure("Florence-2-large", cache_dir=cache)
    assert str(cache / "microsoft--Florence-2-large" / KNOWN_CHECKPOINTS[1].revision) in sentence


@pytest.mark.parametrize("endpoint", ["http:", "nonsense", "http://[::1"])
def test_address_that_is_none(hub, cache, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert endpoint in failure(cache_dir=cache)


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "tokenizer_config.json"])
def test_missing_file_is_named_offline_and_fetched_online(hub, cache, name):
    found = resolve(REPOSITORY, cache_dir=cache)
    (found.folder / name).unlink()
    assert f"{name} is missing" in failure(cache_dir=cache, offline=True)
    hub.served.clear()
    assert resolve(REPOSITORY, cache_dir=cache) == found
    assert [served.file for served in hub.served] == [name]


def test_unfinished_download_names_what_is_missing(hub, cache, known, monkeypatch):
    hub.faults.file_status[WEIGHTS] = 403
    failure(known.name, cache_dir=cache)
    sentence = failure(known.name, cache_dir=cache, offline=True)
    assert "model.safetensors is missing" in sentence
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    assert NOWHERE in failure(known.name, cache_dir=cache)


def test_damaged_file_is_found_offline_only_when_asked(hub, cache):
    found = resolve(REPOSITORY, cache_dir=cache)
    damage(found.folder / WEIGHTS)
    assert resolve(REPOSITORY, cache_dir=cache, offline=True) == found
    sentence = failure(cache_dir=cache, offline=True, verify="full")
    assert "model.safetensors does not have the published hash" in sentence


def test_files_of_a_known_name_placed_by_hand(hub, cache, known):
    folder = place(folder_of(hub, cache))
    found = resolve(known.name, cache_dir=cache, offline=True)
    assert (found.folder, found.revision) == (folder, known.revision)
    (folder / WEIGHTS).write_bytes(weights(seed=5))
    sentence = failure(known.name, cache_dir=cache, offline=True)
    assert "is not the published Florence-2-base" in sentence
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").unlink()
    assert "holds no weights" in failure(known.name, cache_dir=cache, offline=True)


def test_online_keeps_whole_files_placed_by_hand(hub, cache, known):
    place(folder_of(hub, cache), **{"config.json": b"{}"})
    resolve(known.name, cache_dir=cache)
    assert [served.file for served in hub.served] == ["config.json"]


def test_the_clients_own_cache_serves_offline(hub, cache, known, tmp_path):
    home = tmp_path / "client-cache" / "models--someone--Florence-2-tiny"
    place(home / "snapshots" / known.revision)
    found = resolve(known.name, cache_dir=cache, offline=True)
    assert found.source == "hub cache"
    assert found.revision == known.revision


def test_complete_cache_may_be_read_only(hub, cache):
    found = resolve(REPOSITORY, cache_dir=cache)
    before = sorted(path.stat().st_mtime_ns for path in cache.rglob("*"))
    assert resolve(REPOSITORY, cache_dir=cache) == found
    assert sorted(path.stat().st_mtime_ns for path in cache.rglob("*")) == before


def test_local_folder(tmp_path):
    folder = place(tmp_path / "mine")
    found = resolve(folder)
    assert found == resolve(str(folder), offline=True)
    assert (found.source, found.revision) == ("folder", None)
    assert found.files[-1] == WEIGHTS


def test_downloaded_folder_copied_elsewhere_keeps_its_manifest(hub, cache, tmp_path):
    found = resolve(REPOSITORY, cache_dir=cache)
    copy = Path(shutil.copytree(found.folder, tmp_path / "copy"))
    assert resolve(copy, verify="full").revision == found.revision
    with (copy / "tokenizer.json").open("ab") as stream:
        stream.write(b" ")
    assert "tokenizer.json has 20014 bytes instead of 20013" in failure(copy)


def shards(weight_map):
    index = json.dumps({"weight_map": weight_map}).encode()
    return {WEIGHTS: None, "model.safetensors.index.json": index}


SIZE = len(weights())
PART = "model-00001-of-00001.safetensors"
UNUSABLE = [
    ({"config.json": None}, "holds no config.json"),
    ({"config.json": b"{"}, "config.json cannot be read as JSON"),
    ({"config.json": b"[]"}, "must hold a JSON object, got a list"),
    ({"tokenizer.json": None}, "neither tokenizer.json nor vocab.json with merges.txt"),
    (NO_WEIGHTS, "holds no weights"),
    ({WEIGHTS: weights()[:-1]}, f"must have {SIZE} bytes by its own header"),
    ({WEIGHTS: weights() + b"x"}, f"must have {SIZE} bytes by its own header"),
    ({WEIGHTS: weights()[:20]}, "is not a whole safetensors file, and it has 20 bytes"),
    ({WEIGHTS: b""}, "model.safetensors is empty (0 bytes)"),
    ({WEIGHTS: b"\x02" + bytes(7) + b"??"}, "unreadable safetensors header"),
    ({WEIGHTS: None}, "pytorch_model.bin is not a whole PyTorch file"),
    (
        {WEIGHTS: None, "pytorch_model.bin": b"Entry not found"},
        "is not a whole PyTorch file, and it has 15 bytes",
    ),
    ({WEIGHTS: None, "pytorch_model.bin": b""}, "is empty (0 bytes)"),
    (
        {**NO_WEIGHTS, "adapter_config.json": b"{}"},
        "adapter_config.json and neither full weights nor adapter_model.safetensors",
    ),
    (
        {**NO_WEIGHTS, "adapter_model.bin": b"PK", "config.json": None},
        "holds adapter_model.bin without adapter_config.json",
    ),
    ({**NO_WEIGHTS, "florence.safetensors": weights(9)}, "only florence.safetensors; if that"),
    (shards({}), "lists no weights"),
    (shards({"a": PART}), f"lacks {PART}"),
]


@pytest.mark.parametrize(("changes", "words"), UNUSABLE)
def test_unusable_folder_names_the_file(tmp_path, changes, words):
    assert words in failure(place(tmp_path / "mine", **changes))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 75\n"
STAND_INS = {
    "Git LFS": (POINTER, f"({len(POINTER)} bytes) is a Git LFS pointer", "run `git lfs pull`"),
    "git-annex": (b"/annex/objects/SHA256E-s9--00.json\n", "is a git-annex pointer", "annex get"),
    "a page": (b"<!DOCTYPE html>\n<html lang='en'>", "is a web page", "fetch it again"),
    "a page after a comment": (b"\n <!-- x -->\n<HTML><body>", "is a web page", "fetch it again"),
    "an answer of a store": (b"<?xml version='1.0'?><Error><Code>", "is a web page", "signed in"),
}


@pytest.mark.parametrize("kind", STAND_INS)
@pytest.mark.parametrize(
    "name",
    [WEIGHTS, "pytorch_model.bin", "tokenizer.json", "config.json", "vocab.json"],
)
def test_a_file_that_stands_in_for_another_is_called_what_it_is(tmp_path, name, kind):
    content, is_what, remedy = STAND_INS[kind]
    changes = {WEIGHTS: None} if name.endswith(".bin") else {}
    sentence = failure(place(tmp_path / "mine", **changes, **{name: content}))
    assert f"mine/{name} (" in sentence
    assert is_what in sentence
    assert remedy in sentence


@pytest.mark.parametrize(
    "name", [WEIGHTS, "model.bf16.safetensors", "config.json", "generation_config.json"]
)
def test_a_link_to_what_was_left_behind_is_called_one(tmp_path, name):
    folder = place(tmp_path / "mine", **({} if name.endswith(".json") else NO_WEIGHTS))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../../blobs/0f")
    assert f"{name} is a link to ../../blobs/0f, which is not there" in failure(folder)


@pytest.mark.parametrize("name", ["notes.md", "model.fp16.safetensors", "pytorch_model.bin"])
def test_a_link_that_nobody_follows_may_lead_nowhere(tmp_path, name):
    folder = place(tmp_path / "mine", **{"pytorch_model.bin": None})
    (folder / name).symlink_to("../../blobs/0f")
    assert resolve(folder).files[-1] == WEIGHTS


def test_a_pointer_in_a_copied_download_is_called_one(hub, cache, tmp_path):
    copy = Path(shutil.copytree(resolve(REPOSITORY, cache_dir=cache).folder, tmp_path / "copy"))
    (copy / WEIGHTS).write_bytes(POINTER)
    assert f"has {len(POINTER)} bytes instead of" in failure(copy)
    assert "and is a Git LFS pointer" in failure(copy)


# Of these files, so many of the first ones hold the weights.
VARIANTS = {
    "one file": (1, ["model.fp16.safetensors"]),
    "pickled": (1, ["pytorch_model.fp16.bin"]),
    "the finest known": (
        1,
        ["model.fp16.safetensors", "model.bf16.safetensors", "model.abc.safetensors"],
    ),
    "plain before variant": (1, ["pytorch_model.bin", "model.fp16.safetensors"]),
    "index with parts": (
        3,
        [
            "model.safetensors.index.fp16.json",
            "model.fp16-00001-of-00002.safetensors",
            "model.fp16-00002-of-00002.safetensors",
            "model-00001-of-00001.safetensors",
        ],
    ),
    "parts named the old way": (
        2,
        ["model.safetensors.index.fp16.json", "model-00001-of-00001.fp16.safetensors"],
    ),
    "no weights at all": (
        0,
        ["adapter_model.safetensors", "model.fp16-00001-of-00001.safetensors"],
    ),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_which_files_hold_the_weights(case):
    count, names = VARIANTS[case]
    assert list(weight_files(reversed(names))) == names[:count]


def test_full_weights_beside_an_adapters_config_are_taken(tmp_path):
    found = resolve(place(tmp_path / "merged", **{"adapter_config.json": b"{}"}))
    assert found.files[-1] == WEIGHTS


def test_names_that_stand_for_nothing(hub, cache, tmp_path, monkeypatch):
    inside = tmp_path / "empty" / "place"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    assert "Did you mean 'Florence-2-large'?" in failure("florence-2-larg", cache_dir=cache)
    for name in (tmp_path / "none", "./none", "/no/such/folder", "a/../b", "../x"):
        assert "does not exist" in failure(name, cache_dir=cache)
    assert hub.requests == []


def test_demo_is_found_or_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "PROJECT_ROOT", tmp_path)
    monkeypatch.delenv("FLORENCE2_DEMO", raising=False)
    monkeypatch.chdir(tmp_path)
    assert "copy the folder demo/checkpoint" in failure("demo")
    folder = place(tmp_path / "demo" / "checkpoint")
    assert resolve("demo").folder == folder
    assert resolve("demo").source == "demo"
    monkeypatch.setenv("FLORENCE2_DEMO", str(tmp_path / "gone"))
    assert "does not exist" in failure("demo")


def test_table_is_pinned():
    assert CHECKPOINT_NAMES[-1] == "demo"
    assert len({known.revision for known in KNOWN_CHECKPOINTS}) == 4
    for known in KNOWN_CHECKPOINTS:
        assert len(known.revision) == 40
        assert len(known.weights_sha256) == 64
        assert known.repository.endswith(known.name)


HOMELESS = "~nobody_of_this_name"


@pytest.mark.parametrize("name", [HOMELESS, f"{HOMELESS}/checkpoint", Path(HOMELESS) / "x"])
def test_a_home_of_nobody_is_one_sentence(name, monkeypatch):
    assert "write the whole path" in failure(name, offline=True)
    for variable, checkpoint in (("CACHE", "Florence-2-base"), ("DEMO", "demo")):
        monkeypatch.setenv(f"FLORENCE2_{variable}", str(name))
        assert HOMELESS in failure(checkpoint, offline=True)


def test_a_user_without_a_home_is_told_to_name_the_cache(monkeypatch):
    """In a container that runs as a number which no file of users has."""

    def homeless(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FLORENCE2_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert "FLORENCE2_CACHE" in failure("Florence-2-base", offline=True)


@pytest.mark.parametrize(
    "name", ["a\0b", "n" * 5000, "n/" * 3000, "\ud800", "\udce9/x", "/dev/null/x"]
)
def test_a_name_that_no_file_system_takes_is_one_short_sentence(name):
    assert len(failure(name, offline=True)) < 600
