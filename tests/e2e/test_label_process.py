from __future__ import annotations

import json
import random
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from label_with_fake_model import Command, Commands
from PIL import Image


class Runs:
    """Runs of one command line, and what they left."""

    def __init__(self, commands: Commands, folder: Path, count: int) -> None:
        self._commands = commands
        self.images, self.out, self.log = folder / "images", folder / "out", folder / "log"
        self.images.mkdir()
        for number in range(count):
            image = Image.new("RGB", (16, 12), (number % 256, number // 256, 0))
            image.save(self.images / f"{number:05}.png")
        self.count = count

    def start(
        self, *options: str, seconds: float = 0.0, max_file_bytes: int | None = None
    ) -> Command:
        words = ["label", str(self.images), "--out", str(self.out), "--batch", "4", *options]
        return self._commands.start(words, seconds, self.log, max_file_bytes)

    def finish(self, *options: str) -> tuple[int, str]:
        return self.start(*options).finish()

    def asked(self) -> Counter[int]:
        return (
            Counter(int(line) for line in self.log.read_text().split())
            if self.log.exists()
            else Counter()
        )

    def wait_for(self, images: int, process: Command) -> None:
        deadline = time.monotonic() + 120
        while sum(self.asked().values()) < images:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def wait_for_journal(self, process: Command) -> None:
        while not (self.out / "journal.jsonl").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)

    def check_complete(self) -> None:
        """Every image once, with the labels that belong to it, readable by the SDK."""
        from serve.sdk import sly

        project = sly.Project(str(self.out / "project"), sly.OpenMode.READ)
        (dataset,) = project.datasets
        names = dataset.get_items_names()
        assert sorted(names) == [f"{number:05}.png" for number in range(self.count)]
        for name in names:
            annotation = sly.Annotation.load_json_file(dataset.get_ann_path(name), project.meta)
            number = int(name[:5])
            found = [label.obj_class.name for label in annotation.labels]
            assert found == ([] if number % 3 == 0 else [f"thing {number % 7}"])
        report = json.loads((self.out / "report.json").read_text())
        empty = len(range(0, self.count, 3))
        assert (report["labeled"], report["empty"]) == (self.count - empty, empty)
        assert (report["failed"], report["pending"]) == (0, 0)


@pytest.fixture(scope="module")
def commands():
    started = Commands()
    yield started
    started.close()


@pytest.fixture
def runs(commands, tmp_path):
    return lambda count, folder=tmp_path: Runs(commands, folder, count)


def test_killed_again_and_again_nothing_is_lost_and_nothing_done_twice(runs):
    work = runs(60)
    chance = random.Random(5)
    kills = 3
    done = 0
    for _ in range(kills):
        process = work.start(seconds=0.02)
        while _done(work.out) < done + 4:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        time.sleep(chance.random() * 0.08)
        process.kill()
        assert _done(work.out) > done, "what was journaled before stays"
        done = _done(work.out)
    before = _stamps(work.out)
    code, err = work.finish()
    assert code == 0, err
    work.check_complete()
    # A kill costs at most the batch with the model and the one that is written meanwhile: those
    # images are asked about again, nothing else.
    assert sum(work.asked().values()) <= 60 + 2 * 4 * kills
    after = _stamps(work.out)
    assert {name: after[name] for name in before} == before, "journaled files are not rewritten"


def _done(out: Path) -> int:
    if not (out / "journal.jsonl").exists():
        return 0
    return sum(line.endswith("}\n") for line in (out / "journal.jsonl").open()) - 1


def _stamps(out: Path) -> dict[str, int]:
    """When the files of the journaled images were written."""
    names = re.findall(r'"name": "([^"]+)"', (out / "journal.jsonl").read_text())
    return {name: (out / "project/ds0/ann" / f"{name}.json").stat().st_mtime_ns for name in names}


def test_ctrl_c_finishes_the_batch_reports_and_says_how_to_go_on(runs):
    work = runs(40)
    process = work.start("--coco", seconds=0.5)
    work.wait_for(4, process)
    process.send_signal(signal.SIGINT)
    code, err = process.finish()
    assert code == 130, err
    report = json.loads((work.out / "report.json").read_text())
    assert report["this_run"]["interrupted"]
    assert report["pending"] == 40 - report["images"] > 0
    assert report["resume_command"] in err
    assert report["resume_command"].startswith("florence2 label ")
    assert "Traceback" not in err
    code, err = work.finish("--coco")
    assert code == 0, err
    work.check_complete()
    assert set(work.asked().values()) == {1}, "a stopped run does nothing twice"
    assert (work.out / "coco/ds0/annotations/coco_instances.json").exists()


def test_a_second_ctrl_c_stops_at_once_and_loses_nothing(runs):
    work = runs(12)
    process = work.start(seconds=100.0)
    work.wait_for_journal(process)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    code, err = process.finish()
    assert code == 130, err
    assert time.monotonic() - started < 60
    assert work.finish()[0] == 0
    work.check_complete()


def test_two_runs_at_once_into_one_folder(runs):
    work = runs(12)
    first = work.start(seconds=600.0)
    work.wait_for_journal(first)
    code, err = work.finish()
    first.kill()
    assert code == 2
    assert "in use by another" in err
    assert work.finish()[0] == 0, "a killed run leaves no lock behind"
    work.check_complete()


def test_memory_does_not_grow_with_the_folder(runs, tmp_path):
    """Peak memory of a run over 600 images against one over 50."""
    peaks = {}
    for count in (50, 600):
        folder = tmp_path / str(count)
        folder.mkdir()
        process = runs(count, folder).start()
        code, err = process.finish()
        assert code == 0, err
        peaks[count] = process.peak_kib / 1024
    assert peaks[600] < peaks[50] + 8, peaks


def test_a_reader_that_leaves_costs_neither_the_report_nor_the_exports(runs):
    """As ``label ... 2>&1 | head -1``."""
    work = runs(8)
    process = work.start("--coco")
    process.stderr.close()
    assert process.wait() == 0
    work.check_complete()
    assert (work.out / "coco").is_dir()


@pytest.mark.skipif(sys.platform != "linux", reason="the limit works on Linux only")
def test_a_file_size_limit_in_the_middle_is_a_sentence(runs):
    """The nearest thing to a full disk that needs no disk of its own."""
    work = runs(8)
    code, err = work.start(max_file_bytes=1500).finish()
    assert code in (1, 2)
    assert "Traceback" not in err
    assert "File too large" in err
    assert work.finish()[0] == 0
    work.check_complete()
