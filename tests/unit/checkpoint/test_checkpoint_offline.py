"""Machines without a hub, and folders placed by hand: whole ones work, others say what is amiss."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from hub_files import REPOSITORY, files, folder_of, weights

from florence2.checkpoint import catalog as resolve_module
from florence2.checkpoint.catalog import (
    CHECKPOINT_NAMES,
    KNOWN_CHECKPOINTS,
    KnownCheckpoint,
    resolve,
)
from florence2.checkpoint.files import weight_files
from florence2.checkpoint.hub import is_offline
from florence2.errors import CheckpointError

NOWHERE = "http://127.0.0.1:9"


def failure(name: str | Path = REPOSITORY, **options: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve(name, **options)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


def place(folder: Path, **changes: bytes | None) -> Path:
    folder.mkdir(parents=True)
    for name, content in files(**changes).items():
        (folder / name).write_bytes(content)
    return folder


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
        "",
    )
    monkeypatch.setitem(resolve_module.KNOWN_BY_NAME, known.name, known)
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


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_missing_file_is_named_offline_and_fetched_online(hub, cache, name):
    found = resolve(REPOSITORY, cache_dir=cache)
    (found.folder / name).unlink()
    assert f"{name} is missing" in failure(cache_dir=cache, offline=True)
    hub.served.clear()
    assert resolve(REPOSITORY, cache_dir=cache) == found
    assert [served.file for served in hub.served] == [name]


def test_unfinished_download_names_what_is_missing(hub, cache, known, monkeypatch):
    hub.faults.file_status["model.safetensors"] = 403
    failure(known.name, cache_dir=cache)
    sentence = failure(known.name, cache_dir=cache, offline=True)
    assert "model.safetensors is missing" in sentence
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    assert NOWHERE in failure(known.name, cache_dir=cache)


def test_damaged_file_is_found_offline_only_when_asked(hub, cache):
    found = resolve(REPOSITORY, cache_dir=cache)
    path = found.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert resolve(REPOSITORY, cache_dir=cache, offline=True) == found
    sentence = failure(cache_dir=cache, offline=True, verify="full")
    assert "model.safetensors does not have the published hash" in sentence


def test_files_of_a_known_name_placed_by_hand(hub, cache, known):
    folder = place(folder_of(hub, cache))
    found = resolve(known.name, cache_dir=cache, offline=True)
    assert (found.folder, found.revision) == (folder, known.revision)
    (folder / "model.safetensors").write_bytes(weights(seed=5))
    sentence = failure(known.name, cache_dir=cache, offline=True)
    assert "is not the published Florence-2-base" in sentence
    (folder / "model.safetensors").unlink()
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
    assert found.files[-1] == "model.safetensors"


def test_downloaded_folder_copied_elsewhere_keeps_its_manifest(hub, cache, tmp_path):
    found = resolve(REPOSITORY, cache_dir=cache)
    copy = Path(shutil.copytree(found.folder, tmp_path / "copy"))
    assert resolve(copy, verify="full").revision == found.revision
    with (copy / "tokenizer.json").open("ab") as stream:
        stream.write(b" ")
    assert "tokenizer.json has 20014 bytes instead of 20013" in failure(copy)


NO_WEIGHTS = {"model.safetensors": None, "pytorch_model.bin": None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config.json": None}, "holds no config.json"),
        ({"config.json": b"{"}, "config.json cannot be read as JSON"),
        ({"config.json": b"[]"}, "must hold a JSON object, got a list"),
        ({"tokenizer.json": None}, "neither tokenizer.json nor vocab.json with merges.txt"),
        ({"model.safetensors": None, "pytorch_model.bin": None}, "holds no weights"),
        (
            {"model.safetensors": weights()[:-1]},
            f"must have {len(weights())} bytes by its own header",
        ),
        (
            {"model.safetensors": weights() + b"x"},
            f"must have {len(weights())} bytes by its own header",
        ),
        ({"model.safetensors": weights()[:20]}, "is not a whole safetensors file"),
        ({"model.safetensors": weights()[:20]}, "and it has 20 bytes"),
        ({"model.safetensors": b""}, "model.safetensors is empty (0 bytes)"),
        ({"model.safetensors": b"\x02" + bytes(7) + b"??"}, "unreadable safetensors header"),
        ({"model.safetensors": None}, "pytorch_model.bin is not a whole PyTorch file"),
        (
            {"model.safetensors": None, "pytorch_model.bin": b"Entry not found"},
            "is not a whole PyTorch file, and it has 15 bytes",
        ),
        ({"model.safetensors": None, "pytorch_model.bin": b""}, "is empty (0 bytes)"),
        (
            {**NO_WEIGHTS, "adapter_config.json": b"{}", "adapter_model.safetensors": weights(9)},
            "holds a LoRA adapter alone",
        ),
        ({**NO_WEIGHTS, "adapter_model.bin": b"PK", "config.json": None}, "a LoRA adapter alone"),
        ({**NO_WEIGHTS, "florence.safetensors": weights(9)}, "only florence.safetensors; if that"),
        (
            {"model.safetensors": None, "model.safetensors.index.json": b'{"weight_map": {}}'},
            "lists no weights",
        ),
        (
            {
                "model.safetensors": None,
                "model.safetensors.index.json": json.dumps(
                    {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
                ).encode(),
            },
            "lacks model-00001-of-00001.safetensors",
        ),
    ],
)
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
    ["model.safetensors", "pytorch_model.bin", "tokenizer.json", "config.json", "vocab.json"],
)
def test_a_file_that_stands_in_for_another_is_called_what_it_is(tmp_path, name, kind):
    content, is_what, remedy = STAND_INS[kind]
    changes = {"model.safetensors": None} if name.endswith(".bin") else {}
    sentence = failure(place(tmp_path / "mine", **changes, **{name: content}))
    assert f"mine/{name} (" in sentence
    assert is_what in sentence
    assert remedy in sentence


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.bf16.safetensors", "config.json", "generation_config.json"]
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
    assert resolve(folder).files[-1] == "model.safetensors"


def test_a_pointer_in_a_copied_download_is_called_one(hub, cache, tmp_path):
    copy = Path(shutil.copytree(resolve(REPOSITORY, cache_dir=cache).folder, tmp_path / "copy"))
    (copy / "model.safetensors").write_bytes(POINTER)
    assert f"has {len(POINTER)} bytes instead of" in failure(copy)
    assert "and is a Git LFS pointer" in failure(copy)


VARIANTS = {
    "one file": (["model.fp16.safetensors"], ["model.fp16.safetensors"]),
    "pickled": (["pytorch_model.fp16.bin"], ["pytorch_model.fp16.bin"]),
    "the finest known": (
        ["model.bf16.safetensors", "model.fp16.safetensors", "model.abc.safetensors"],
        ["model.fp16.safetensors"],
    ),
    "plain before variant": (
        ["model.fp16.safetensors", "pytorch_model.bin"],
        ["pytorch_model.bin"],
    ),
    "index with parts": (
        [
            "model.safetensors.index.fp16.json",
            "model.fp16-00001-of-00002.safetensors",
            "model.fp16-00002-of-00002.safetensors",
            "model-00001-of-00001.safetensors",
        ],
        [
            "model.safetensors.index.fp16.json",
            "model.fp16-00001-of-00002.safetensors",
            "model.fp16-00002-of-00002.safetensors",
        ],
    ),
    "parts named the old way": (
        ["model.safetensors.index.fp16.json", "model-00001-of-00001.fp16.safetensors"],
        ["model.safetensors.index.fp16.json", "model-00001-of-00001.fp16.safetensors"],
    ),
    "no weights at all": (
        ["adapter_model.safetensors", "model.fp16-00001-of-00001.safetensors"],
        [],
    ),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_which_files_hold_the_weights(case):
    names, chosen = VARIANTS[case]
    assert list(weight_files(reversed(names))) == chosen


def test_full_weights_beside_an_adapters_config_are_taken(tmp_path):
    found = resolve(place(tmp_path / "merged", **{"adapter_config.json": b"{}"}))
    assert found.files[-1] == "model.safetensors"


def test_names_that_stand_for_nothing(hub, cache, tmp_path, monkeypatch):
    inside = tmp_path / "empty" / "place"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    assert "Did you mean 'Florence-2-large'?" in failure("florence-2-larg", cache_dir=cache)
    for name in (tmp_path / "none", "./none", "/no/such/folder", "a/../b", "../x"):
        assert "does not exist" in failure(name, cache_dir=cache)
    assert hub.requests == []


def test_demo_is_found_or_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(resolve_module, "_PROJECT_ROOT", tmp_path)
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
        assert known.native_repository.endswith(known.native_repository.partition("@")[2])
        assert known.repository.endswith(known.name)


HOMELESS = "~nobody_of_this_name"


@pytest.mark.parametrize("name", [HOMELESS, f"{HOMELESS}/checkpoint", Path(HOMELESS) / "x"])
def test_a_home_of_nobody_is_one_sentence(name):
    assert "write the whole path" in failure(name, offline=True)


@pytest.mark.parametrize(
    ("variable", "name"), [("FLORENCE2_CACHE", "Florence-2-base"), ("FLORENCE2_DEMO", "demo")]
)
def test_a_variable_that_names_a_home_of_nobody_is_one_sentence(variable, name, monkeypatch):
    monkeypatch.setenv(variable, f"{HOMELESS}/files")
    assert HOMELESS in failure(name, offline=True)


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
