"""A Ray cluster of two nodes and an object store: kills in the middle, and every image is labeled
once or named."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

import psutil
import pytest
from PIL import ImageChops
from platform_double import TOKEN

from serve.scaling.plan import Plan, Source
from serve.scaling.storage import Storage

pytest.importorskip("ray")
pytest.importorskip("moto")
pytest.importorskip("s3fs")

pytestmark = pytest.mark.soak

ROOT = Path(__file__).parents[2]
NUM_IMAGES = int(os.environ.get("FLORENCE_SOAK_IMAGES", "2000"))
SHARD_SIZE = 25
NUM_BROKEN = 5
# Enough for a few objects an image, and quick.
OPTIONS = ("--model", "demo", "--task", "<OD>", "--threshold", "0.3", "--num-beams", "1")
CLUSTER_MEMORY = 250 * 2**20


@pytest.fixture(scope="module")
def store():
    """S3 on this machine, with a bucket of drawn images and one for labels."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "OMP_NUM_THREADS": "1",
    }
    import boto3
    from botocore.config import Config

    client = boto3.client("s3", config=Config(retries={"max_attempts": 10}))
    for bucket in ("images", "labels"):
        client.create_bucket(Bucket=bucket)
    for key, content in drawn_images():
        client.put_object(Bucket="images", Key=key, Body=content)
    yield client
    server.kill()
    server.wait()


def drawn_images():
    """Keys and files; some of them are no images whatever their names say."""
    from florence2_demo.drawing import draw_scene
    from florence2_demo.scene import make_scene

    scenes = [draw_scene(make_scene(seed)).resize((192, 144)) for seed in range(50)]
    for number in range(NUM_IMAGES):
        key = f"set/{number % 7}/{number:05}.jpg"
        if number % (NUM_IMAGES // NUM_BROKEN) == 3:
            yield key, b"no image"
            continue
        file = io.BytesIO()
        ImageChops.offset(scenes[number % 50], number // 50).save(file, "JPEG")
        yield key, file.getvalue()


@pytest.fixture
def cluster(store):
    """Two nodes, each of which has two of its processes' cores; the second one may be killed."""
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "object_store_memory": CLUSTER_MEMORY,
            "include_dashboard": False,
        },
    )
    yield made
    made.shutdown()


def add_node(cluster):
    return cluster.add_node(num_cpus=2, object_store_memory=CLUSTER_MEMORY)


def start(cluster, out: str, log: Path, *options: str) -> subprocess.Popen:
    words = (
        "label", "s3://images/set", "--out", out, "--recursive", "--coco", *OPTIONS,
        "--ray", cluster.address, "--shard-size", str(SHARD_SIZE), "--workers", "2", *options,
    )  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "serve.cli.main", *words], cwd=ROOT, stderr=log.open("w")
    )


def keys_of(store, bucket: str, prefix: str = "") -> list[str]:
    pages = store.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [one["Key"] for page in pages for one in page.get("Contents", ())]


def wait_for_shards(store, run: subprocess.Popen, count: int, log: Path) -> int:
    """Returns once so many shards are committed."""
    until = time.monotonic() + 1200
    while (found := len(keys_of(store, "labels", "out/committed/"))) < count:
        assert run.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.3)
    return found


def workers_of(node) -> list[psutil.Process]:
    """The processes of a node that hold the model."""
    (raylet,) = node.all_processes["raylet"]
    below = psutil.Process(raylet.process.pid).children(recursive=True)
    found = []
    for one in below:
        # Some end meanwhile.
        with suppress(psutil.Error):
            if "_Worker" in " ".join(one.cmdline()):
                found.append(one)
    return found


def test_an_actor_the_driver_and_a_node_end_and_every_image_is_labeled_once_or_named(
    cluster, store, tmp_path
):
    node = add_node(cluster)
    log = tmp_path / "first.log"
    run = start(cluster, "s3://labels/out", log)
    done = wait_for_shards(store, run, 4, log)
    killed = workers_of(node) or workers_of(cluster.head_node)
    assert killed
    killed[0].kill()
    done = wait_for_shards(store, run, done + 4, log)

    run.send_signal(signal.SIGINT)
    assert run.wait(300) == 130, log.read_text()
    told = log.read_text()
    (images,) = re.findall(r"(\d+) labeled \(", told)
    committed = [json.loads(get(store, key)) for key in keys_of(store, "labels", "out/committed/")]
    assert int(images) == sum(one["labeled"] for one in committed)
    assert "go on with:\nflorence2 label s3://images/set --out s3://labels/out" in told

    log = tmp_path / "second.log"
    run = start(cluster, "s3://labels/out", log)
    wait_for_shards(store, run, len(committed) + 4, log)
    cluster.remove_node(node, allow_graceful=False)
    assert run.wait(3600) == 1, log.read_text()
    check_each_once_or_named(store)


@pytest.mark.parametrize(
    "options", [(), ("--tiling", "160", "--nms", "0.5")], ids=["whole", "tiles"]
)
def test_the_labels_are_those_of_a_run_over_a_folder(tmp_path, options):
    found = []
    for out, where in (("one", ()), ("many", ("--ray", "local", "--shard-size", "4"))):
        words = ("label", str(ROOT / "demo" / "images"), "--out", str(tmp_path / out))
        ended = subprocess.run(
            [sys.executable, "-m", "serve.cli.main", *words, *OPTIONS, *options, *where],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
            timeout=1200,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr
        found.append(labels_below(tmp_path / out))
    assert len(found[0]) == 10
    assert found[0] == found[1]


def labels_below(folder: Path) -> dict[str, list]:
    """Class, shape, score and tags of every label, by image."""
    labels = {}
    for path in folder.rglob("ann/*.json"):
        labels[path.name] = [
            (one["classTitle"], one["points"], [(tag["name"], tag["value"]) for tag in one["tags"]])
            for one in json.loads(path.read_text())["objects"]
        ]
    return labels


def test_of_many_who_create_one_name_the_store_lets_one(store):
    target = Storage("s3://labels/one")

    def create(name, number):
        return target.create(name, b"%d" % number)

    for number in range(5):
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(partial(create, f"{number}"), range(8)))
        assert made.count(True) == 1
        assert target.read(f"{number}") == b"%d" % made.index(True)


def test_a_bucket_is_listed_page_by_page_and_from_where_a_plan_was_cut(store):
    target = Storage("s3://labels/listed")
    source = Source("s3://images/set", recursive=True, skip=target.address)
    first = Plan(target, source, 10).shards()
    begun = [next(first) for _ in range(30)]
    first.close()
    shards = list(Plan(target, source, 10).shards())
    assert shards[:30] == begun
    wanted = [key.removeprefix("set/") for key in keys_of(store, "images")]
    assert [one.key for shard in shards for one in shard.images] == wanted


def get(store, key: str) -> bytes:
    return store.get_object(Bucket="labels", Key=key)["Body"].read()


def check_each_once_or_named(store) -> None:
    wanted = {key.removeprefix("set/") for key in keys_of(store, "images")}
    assert len(wanted) == NUM_IMAGES
    committed = [json.loads(get(store, key)) for key in keys_of(store, "labels", "out/committed/")]
    folders = {one["folder"] for one in committed}
    stored = keys_of(store, "labels", "out/shards/")
    assert {"/".join(key.split("/")[1:3]) for key in stored} == folders
    labeled = Counter(
        Path(key).name.removesuffix(".json").replace("__", "/") for key in stored if "/ann/" in key
    )
    assert set(labeled.values()) == {1}
    copied = Counter(Path(key).name.replace("__", "/") for key in stored if "/img/" in key)
    assert copied == labeled
    failed = [
        one["image"] for one in csv.DictReader(io.StringIO(get(store, "out/failed.csv").decode()))
    ]
    assert len(failed) == len(set(failed)) == NUM_BROKEN
    assert set(labeled) | set(failed) == wanted
    assert not set(labeled) & set(failed)
    report = json.loads(get(store, "out/report.json"))
    assert report["images"] == NUM_IMAGES
    assert report["labeled"] + report["empty"] == NUM_IMAGES - NUM_BROKEN
    assert (report["failed"], report["pending"]) == (NUM_BROKEN, 0)


NUM_OF_PROJECT = max(20, NUM_IMAGES // 10)


@pytest.fixture
def machines_know_platform(platform, monkeypatch):
    """The processes of a cluster that is started after it have its address and token."""
    monkeypatch.setenv("SERVER_ADDRESS", platform.address)
    monkeypatch.setenv("API_TOKEN", TOKEN)
    return platform


def test_a_project_goes_through_a_bucket_into_another_project_once_each(
    machines_know_platform, cluster, store, tmp_path
):
    """A worker is killed on the way, and the command of the upload."""
    platform = machines_know_platform
    source, target = platform.state.add_project("in"), platform.state.add_project("out")
    dataset = platform.state.add_dataset(source.id, "street")
    for key, content in islice(drawn_images(), NUM_OF_PROJECT):
        if content != b"no image":
            platform.state.add_image(dataset.id, Path(key).name, content)
    count = len(platform.state.images)
    node = add_node(cluster)
    out, log = "s3://labels/project", tmp_path / "label.log"
    words = ("label", "--project", str(source.id), "--out", out, *OPTIONS)
    words += ("--ray", cluster.address, "--shard-size", "5", "--workers", "2")
    command = [sys.executable, "-m", "serve.cli.main"]
    run = subprocess.Popen([*command, *words], cwd=ROOT, stderr=log.open("w"))
    until = time.monotonic() + 600
    while not keys_of(store, "labels", "project/committed/"):
        assert run.poll() is None, log.read_text()
        assert time.monotonic() < until
        time.sleep(0.3)
    for one in workers_of(node)[:1]:
        one.kill()
    assert run.wait(1200) == 0, log.read_text()

    words = ["upload", out, "--project", str(target.id)]
    with platform.faults.held("annotations.bulk.add"):
        upload = subprocess.Popen([*command, *words], cwd=ROOT)
        while not platform.count("annotations.bulk.add"):
            assert upload.poll() is None
            time.sleep(0.1)
        upload.kill()
        upload.wait(60)
    ended = subprocess.run(
        [*command, *words], cwd=ROOT, timeout=600, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr

    rows = platform.state.datasets_of(target.id)
    there = [one for row in rows for one in platform.state.images_of(row.id)]
    assert len(there) == count
    committed = [
        json.loads(get(store, key)) for key in keys_of(store, "labels", "project/committed/")
    ]
    assert sum(one["images"] for one in committed) == count
    num_labels = sum(len(one.annotation["objects"]) for one in there)
    assert num_labels == sum(one["objects"] for one in committed)
    assert num_labels
