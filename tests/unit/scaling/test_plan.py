"""Which images are in which shard: whatever the source, and whoever asks again."""

from __future__ import annotations

import json

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from florence2.errors import FlorenceError, RequestError
from serve.labeling.images import project_name
from serve.scaling.plan import Plan, Source
from serve.scaling.storage import Storage, listed


def keys(shards) -> list[list[str]]:
    return [[image.key for image in shard.images] for shard in shards]


def source_of(address, target, *, recursive=False) -> Source:
    return Source(str(address), recursive=recursive, skip=target.address)


def letters(count: int) -> dict[str, bytes]:
    return {chr(ord("a") + number): b"" for number in range(count)}


@pytest.fixture
def folder(tmp_path):
    """The same files as ``bucket(**letters(5))`` has."""
    images = tmp_path / "in"
    images.mkdir()
    for name in letters(5):
        (images / f"{name}.png").touch()
    return images


def table_of(folder, kind: str):
    """A table of the folder's images, of which one is named twice and one by its whole path."""
    names = ["a.png", "b.png", "a.png", str(folder / "c.png"), "d.png", "e.png", "f.gif"]
    path = folder / f"list.{kind}"
    if kind == "csv":
        path.write_text("number,image\n" + "".join(f"7,{name}\n" for name in names))
    else:
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.table({"image": names}), path)
    return path


@pytest.mark.parametrize("kind", ["folder", "bucket", "csv", "parquet"])
def test_every_image_of_a_source_is_in_one_shard(kind, folder, bucket, target):
    if kind in ("csv", "parquet"):
        pytest.importorskip("pyarrow")
    address = {
        "folder": lambda: folder,
        "bucket": lambda: bucket(**letters(5)),
        "csv": lambda: table_of(folder, "csv"),
        "parquet": lambda: table_of(folder, "parquet"),
    }[kind]()
    source = source_of(address, target)
    source.check()
    plan = Plan(target, source, 2)
    shards = list(plan.shards())
    assert [len(shard.images) for shard in shards] == [2, 2, 1]
    assert [shard.number for shard in shards] == [0, 1, 2]
    names = [image.key.rsplit("/", 1)[-1] for shard in shards for image in shard.images]
    assert names == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert all("://" in one.address or one.address[0] == "/" for s in shards for one in s.images)
    assert plan.num_planned() == 5
    assert (plan.listing().num_images, plan.listing().num_shards) == (5, 3)
    is_table = kind in ("csv", "parquet")
    assert plan.listing().num_repeated == is_table
    assert [one.path for one in plan.left_out()] == ["f.gif"] * is_table


@pytest.mark.parametrize("recursive", [False, True])
def test_folders_of_a_bucket_are_looked_into_if_told_to(bucket, target, recursive):
    source = source_of(bucket(a=b"", x__b=b"", x__y__c=b""), target, recursive=recursive)
    (shard,) = Plan(target, source, 10).shards()
    names = {"a.png", "x__b.png", "x__y__c.png"} if recursive else {"a.png"}
    assert {image.name for image in shard.images} == names


def test_labels_that_lie_in_the_source_are_not_labeled(bucket):
    target = Storage(f"{bucket(a=b'', out__shards__b=b'')}/out")
    source = source_of("memory://in", target, recursive=True)
    assert keys(Plan(target, source, 10).shards()) == [["a.png"]]


@pytest.mark.parametrize("taken", [1, 20, 21, 44])
@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_a_plan_that_was_cut_short_goes_on_with_the_same_shards(
    kind, taken, tmp_path, bucket, target
):
    images = tmp_path / "in"
    images.mkdir()
    for number in range(45):
        (images / f"{number:02}.png").touch()
        bucket(**{f"{number:02}": b""})
    source = source_of(images if kind == "folder" else "memory://in", target)
    first = Plan(target, source, 1).shards()
    begun = [next(first) for _ in range(taken)]
    first.close()
    whole = list(Plan(target, source, 1).shards())
    assert whole[:taken] == begun
    assert keys(whole) == [[f"{number:02}.png"] for number in range(45)]
    assert list(Plan(target, source, 1).shards()) == whole


def test_two_who_plan_at_once_have_the_same_shards(bucket, target):
    source = source_of(bucket(**letters(3)), target)
    one, other = Plan(target, source, 1).shards(), Plan(target, source, 1).shards()
    first = next(one)
    bucket(aa=b"", d=b"")
    theirs = [next(other), *other]
    assert [first, *one] == theirs
    assert keys(theirs) == [["a.png"], ["b.png"], ["c.png"], ["d.png"]]


def test_images_that_come_while_a_source_is_listed_are_in_no_shard_twice(bucket, target):
    source = source_of(bucket(**letters(25)), target)
    shards = Plan(target, source, 1).shards()
    begun = [next(shards) for _ in range(20)]
    shards.close()
    bucket(a0=b"", y0=b"")
    found = keys(Plan(target, source, 1).shards())
    assert found[:20] == keys(begun)
    assert [key for (key,) in found[20:]] == [f"{one}.png" for one in "uvwxy"] + ["y0.png"]


def test_what_failed_is_planned_again_behind_all_others(bucket, target):
    plan = Plan(target, source_of(bucket(**letters(3)), target), 2)
    first, _ = plan.shards()
    plan.again([first.images[1]])
    *_, again = plan.shards()
    assert (again.number, again.is_again, again.images) == (2, True, first.images[1:])
    assert plan.num_planned() == 3


def test_files_that_no_project_can_hold_are_named(folder, target):
    (folder / "z.gif").touch()
    (folder / "z.txt").touch()
    plan = Plan(target, source_of(folder, target), 2)
    list(plan.shards())
    assert [(one.path, one.code) for one in plan.left_out()] == [("z.gif", "unsupported_kind")]


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("memory://in", "none was found in 'memory://in'; add --recursive"),
        ("memory://empty", "'memory://empty', which is not there"),
        ("/nowhere", "'/nowhere' does not exist"),
        ("memory://in/list.csv", "names images by a table"),
        ("nothing://images", "begins with none that is known"),
    ],
)
def test_a_source_without_images_is_refused(address, told, bucket, tmp_path):
    if address.endswith(".csv"):
        pytest.importorskip("pyarrow")
        told = "'memory://in/list.csv' does not exist"
    bucket(x__a=b"")
    target = Storage(str(tmp_path / "out"))
    with pytest.raises(RequestError, match=told):
        source_of(address, target).check()


def test_a_table_without_the_column_is_refused(tmp_path, target):
    pytest.importorskip("pyarrow")
    table = tmp_path / "list.csv"
    table.write_text("path,size\na.png,7\n")
    with pytest.raises(RequestError, match=r"in a column 'image' and .* has 'path', 'size'"):
        source_of(table, target).check()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("bytes", "has addresses as text and .* it is struct<bytes"),
        ("numbers", "has addresses as text and .* it is int64"),
        ("twice", "in a column 'image' and .* has 'image', 'image'"),
    ],
)
def test_a_column_that_cannot_be_addresses_is_refused(kind, told, tmp_path, target):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "list.parquet"
    if kind == "twice":
        path = tmp_path / "list.csv"
        path.write_text("image,image\na.png,b.png\n")
    else:
        values = {"bytes": [{"bytes": b"", "path": "a.png"}], "numbers": [7]}[kind]
        parquet.write_table(pa.table({"image": values}), path)
    with pytest.raises(RequestError, match=told):
        source_of(path, target).check()


def test_an_image_that_a_table_names_in_two_ways_is_one_and_others_have_names_of_their_own(
    tmp_path, target
):
    pytest.importorskip("pyarrow")
    table = tmp_path / "list.csv"
    named = ["x/a.png", "", "./x/a.png", f"{tmp_path}/x/a.png", "/x/a.png", "s3://x/a.png"]
    table.write_text("image,n\n" + "".join(f"{name},1\n" for name in named))
    plan = Plan(target, source_of(table, target), 10)
    (shard,) = plan.shards()
    assert [one.key for one in shard.images] == ["x/a.png", "/x/a.png", "s3://x/a.png"]
    assert shard.images[0].address == f"{tmp_path}/x/a.png"
    assert shard.images[0].name == "x__a.png"
    assert len({one.name for one in shard.images}) == 3
    assert plan.listing().num_repeated == 2


def test_a_retry_that_was_stopped_is_not_planned_twice(bucket, target):
    plan = Plan(target, source_of(bucket(**letters(5)), target), 1)
    images = [shard.images[0] for shard in plan.shards()]
    assert plan.waiting_again({0, 1, 2, 3, 4}, 5) == set()
    plan.again(images[:2])
    assert plan.waiting_again({0, 1, 2, 3, 4}, 5) == {"a.png", "b.png"}
    assert plan.waiting_again({0, 1, 2, 3, 4, 6}, 5) == {"a.png"}


def test_folders_of_a_store_may_have_no_name():
    keys = "x//b.png", "x__b.png", "x/_b.png", "x____b.png", "/b.png"
    names = {project_name(key, recursive=True) for key in keys}
    assert len(names) == len(keys)


def test_an_address_keeps_the_host_of_its_store():
    class Hosted(MemoryFileSystem):
        protocol = "hosted"

        @classmethod
        def _strip_protocol(cls, path):
            rest = path.removeprefix("hosted://somewhere")
            return MemoryFileSystem._strip_protocol(rest)

    fsspec.register_implementation("hosted", Hosted, clobber=True)
    fsspec.filesystem("memory").pipe_file("/there/x/a.png", b"")
    found = listed(Storage("hosted://somewhere/there"), recursive=True, skip=None, after=None)
    assert list(found) == [("x/a.png", "hosted://somewhere/there/x/a.png")]


def test_an_address_with_a_password_is_refused_and_not_shown(target):
    with pytest.raises(RequestError, match="has a password in it") as refused:
        source_of("sftp://me:secret@host/images", target).check()
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("name", ["list.parquet", "list.csv"])
def test_a_table_that_is_none_is_refused(name, tmp_path, target):
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(b"" if name.endswith("csv") else b"no parquet at all")
    with pytest.raises(RequestError, match="cannot be read as one"):
        source_of(tmp_path / name, target).check()


def test_a_folder_that_lost_the_image_it_was_listed_to_is_not_gone_on_with(folder, target):
    source = source_of(folder, target)
    target.write(
        "plan/000000.jsonl",
        json.dumps({"shard": 0, "images": [], "last_key": "gone.png", "planned": 0}).encode(),
    )
    with pytest.raises(FlorenceError, match=r"as far as 'gone.png', which is not there any more"):
        list(Plan(target, source, 2).shards())
