"""``florence2 label FOLDER`` that is killed, or finds no room on the disk: each image once."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from app_server import clean_environment
from contract_calls import rows_of
from soak_project import same_labels
from soak_table import DISK_BYTES, KILLS, TABLE

pytestmark = pytest.mark.soak


class Folder:
    """The images as files, and what a command made of them."""

    def __init__(self, root: Path, out: Path, images: list[bytes], answers: list) -> None:
        self.images, self.out = root / "images", out
        self.images.mkdir()
        for number, content in enumerate(images):
            (self.images / f"{number:05}.jpg").write_bytes(content)
        self._answers = answers

    @property
    def count(self) -> int:
        return len(self._answers)

    def start(self) -> subprocess.Popen[str]:
        words = ["-m", "serve.cli.main", "label", str(self.images), "--out", str(self.out)]
        words += ["--model", "demo", "--num-beams", "1", "--nms", "off", "--threshold", "0"]
        return subprocess.Popen(
            [sys.executable, *words],
            env=clean_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def num_done(self) -> int:
        journal = self.out / "journal.jsonl"
        return journal.read_bytes().count(b'"image"') if journal.exists() else 0

    def check(self, injected: str, times: object) -> None:
        """Every image has one line in the journal and the labels that it gets alone."""
        lines = (self.out / "journal.jsonl").read_text(encoding="utf-8").splitlines()[1:]
        told = Counter(json.loads(line)["image"] for line in lines)
        wrong = [
            number
            for number, rows in enumerate(self._answers)
            if not same_labels(rows_of(self._annotation(number)), rows)
        ]
        lost = self.count - len(told)
        twice = sum(count > 1 for count in told.values())
        TABLE.add(injected, times, self.count, 0, lost, twice)
        assert (lost, twice, wrong) == (0, 0, [])

    def _annotation(self, number: int) -> dict:
        path = self.out / "project/ds0/ann" / f"{number:05}.jpg.json"
        found: dict = json.loads(path.read_text(encoding="utf-8"))
        for item in found["objects"]:
            item["tags"] = [tag for tag in item["tags"] if tag["name"] == "confidence"]
        return found


def test_a_folder_killed_ten_times(tmp_path, images, answers):
    folder = Folder(tmp_path, tmp_path / "out", images, answers)
    chance = random.Random(31)
    for number in range(KILLS):
        process = folder.start()
        goal = folder.count * (number + chance.random()) / (KILLS + 1)
        while folder.num_done() < goal:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.kill()
        process.communicate()
    _, said = folder.start().communicate()
    assert "Traceback" not in said
    folder.check("kill -9 of `florence2 label FOLDER`", KILLS)


def test_a_folder_on_a_disk_that_is_full(tmp_path, images, answers, small_disk):
    """It ends with a sentence, and goes on once there is room."""
    folder = Folder(tmp_path, small_disk / "out", images, answers)
    process = folder.start()
    _, said = process.communicate()
    assert process.returncode in (1, 2), said
    assert "Traceback" not in said
    assert "No space left on device" in said, said
    done = folder.num_done()
    assert 0 < done < folder.count
    room = ["mount", "-o", f"remount,size={20 * DISK_BYTES}", str(small_disk)]
    subprocess.run(room, check=True)
    process = folder.start()
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert folder.num_done() == folder.count
    folder.check("the disk of `florence2 label FOLDER` is full", 1)
