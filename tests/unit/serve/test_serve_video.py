"""``florence2 label`` of a video, with a scripted model."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from itertools import pairwise

import pytest
from label_fakes import color_in, files_below, result
from video_clips import (
    audio_file,
    claiming_file,
    clip_without_frames,
    cut_file,
    cut_streamable,
    empty_file,
    frame_of,
    gray_clip,
    growing_clip,
    text_file,
    timed_clip,
    turned_clip,
)

from florence2.records import Box, Failure
from serve.labeling.files import Workspace
from serve.sdk import LabelingStatus, sly
from serve.video.journal import FrameJournal

COUNT = 24


def car_at(frame: int) -> Box:
    """A car that goes a pixel to the right in every frame."""
    return Box((float(frame), 4.0, frame + 32.0, 20.0), "car", 0.9)


def moving_car(ask):
    return result(ask.task, car_at(frame_of(color_in(ask))), size=ask.image.size_wh)


@pytest.fixture
def clip(tmp_path):
    return gray_clip(tmp_path / "clip.mp4", COUNT)


@pytest.fixture
def model(model):
    model.answer = moving_car
    return model


def asked(model) -> list[int]:
    return [frame_of(color) for color in model.asked]


def read_video(out, name="clip.mp4") -> sly.VideoAnnotation:
    project = sly.VideoProject(str(out / "project"), sly.OpenMode.READ)
    (dataset,) = project.datasets
    assert list(dataset.get_items_names()) == [name]
    return dataset.get_ann(name, project.meta)


def lefts(annotation) -> dict[int, list[int]]:
    """The left edges of the boxes of every frame."""
    return {
        frame.index: [figure.geometry.left for figure in frame.figures]
        for frame in annotation.frames
    }


def project_files(out) -> dict[str, bytes]:
    root = out / "project"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("options", "expected_asked", "expected_frames"),
    [
        ((), range(COUNT), range(COUNT)),
        # The last frame is looked at too, so that nothing is unknown at the end.
        (("--every", "5"), [0, 5, 10, 15, 20, 23], range(COUNT)),
        (("--from", "5", "--to", "17", "--every", "4"), [5, 9, 13, 17], range(5, 18)),
        (("--from", "20"), [20, 21, 22, 23], range(20, COUNT)),
        (("--from", "7", "--to", "7"), [7], [7]),
        (("--to", "100", "--every", "10"), [0, 10, 20, 23], range(COUNT)),
    ],
)
def test_one_object_keeps_its_number_through_all_frames_of_the_range(
    label, model, clip, report_of, options, expected_asked, expected_frames
):
    run = label(clip, "--batch", "4", *options)
    annotation = read_video(run.out)
    assert run.code == 0
    assert asked(model) == list(expected_asked)
    assert lefts(annotation) == {frame: [frame] for frame in expected_frames}
    assert (annotation.img_size, annotation.frames_count) == ((48, 64), COUNT)
    (car,) = annotation.objects
    assert car.obj_class.name == "car"
    assert [(tag.name, tag.value) for tag in car.tags] == [("confidence", 0.9)]
    assert {figure.status for figure in annotation.figures} == {LabelingStatus.AUTO}
    report = report_of(run.out)
    assert (report["asked"], report["objects"], report["complete"]) == (
        len(expected_asked),
        1,
        True,
    )


def test_the_annotation_is_what_the_sdk_itself_would_write(label, clip):
    out = label(clip, "--every", "3").out
    stored = json.loads((out / "project/ds0/ann/clip.mp4.json").read_text())
    assert read_video(out).to_json() == stored
    assert (out / "project/ds0/video/clip.mp4").read_bytes() == clip.read_bytes()


def test_a_class_that_was_asked_for_has_its_place_before_those_that_were_found(label, clip):
    out = label(clip, "--class", "person", "--class", "car", "--every", "10").out
    project = sly.VideoProject(str(out / "project"), sly.OpenMode.READ)
    assert [one.name for one in project.meta.obj_classes] == ["person", "car"]
    assert project.meta.project_type == "videos"


def test_what_was_seen_in_one_frame_only_is_left_out_and_counted(label, model, clip, report_of):
    def answer(ask):
        frame = frame_of(color_in(ask))
        ghost = [Box((40.0, 30.0, 60.0, 46.0), "ghost", 0.9)] if frame == 8 else []
        return result(ask.task, *ghost, size=ask.image.size_wh)

    model.answer = answer
    run = label(clip, "--every", "4")
    report = report_of(run.out)
    assert (report["objects"], report["boxes_alone"], report["empty"]) == (0, 1, 6)
    assert not read_video(run.out).objects


def stopped_at(frame: int, model) -> None:
    """The user presses Ctrl-C once, when a frame is looked at."""

    def answer(ask):
        if frame_of(color_in(ask)) == frame:
            model.answer = moving_car
            os.kill(os.getpid(), signal.SIGINT)
        return moving_car(ask)

    model.answer = answer


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi", "clip.webm"])
def test_ctrl_c_leaves_what_is_done_and_the_same_command_goes_on(
    label, model, tmp_path, report_of, name
):
    codec = {"clip.avi": "mpeg4", "clip.webm": "libvpx"}.get(name, "libx264")
    clip = gray_clip(tmp_path / name, COUNT, codec=codec, options={"b": "4M"})
    options = ("--every", "3", "--batch", "2")
    whole = label(clip, *options, out=tmp_path / "whole")
    assert asked(model) == [0, 3, 6, 9, 12, 15, 18, 21, 23]
    model.asked.clear()
    stopped_at(9, model)
    stopped = label(clip, *options)
    report = report_of(stopped.out)
    assert stopped.code == 130
    assert (asked(model), report["last_frame"], report["complete"]) == ([0, 3, 6, 9], 9, False)
    assert list(lefts(read_video(stopped.out, name))) == list(range(10))
    model.asked.clear()
    assert label(clip, *options).code == 0
    assert asked(model) == [12, 15, 18, 21, 23]
    assert project_files(stopped.out) == project_files(whole.out)
    model.asked.clear()
    before = files_below(stopped.out / "project")
    assert label(clip, *options).code == 0
    assert (asked(model), files_below(stopped.out / "project")) == ([], before)


@pytest.mark.parametrize("kept_lines", [1, 2, 4, 9])
def test_a_kill_loses_only_the_frames_in_hand(label, model, clip, tmp_path, kept_lines):
    whole = label(clip, "--every", "3", out=tmp_path / "whole").out
    killed = tmp_path / "out"
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "project")
    lines = (whole / "frames.jsonl").read_bytes().splitlines(keepends=True)
    (killed / "frames.jsonl").write_bytes(b"".join(lines[:kept_lines]) + lines[kept_lines][:7])
    model.asked.clear()
    assert label(clip, "--every", "3").code == 0
    assert len(asked(model)) == 9 - (kept_lines - 1)
    assert project_files(killed) == project_files(whole)


def test_what_a_person_changed_is_not_written_over(label, model, clip, tmp_path):
    stopped_at(9, model)
    out = label(clip, "--batch", "2").out
    path = out / "project/ds0/ann/clip.mp4.json"
    path.write_text(path.read_text().replace('"description": ""', '"description": "mine"'))
    edited = path.read_bytes()
    meta = out / "project/meta.json"
    meta.write_text(meta.read_text().replace('"tags": [', '"tags": [ ', 1))
    classes = meta.read_bytes()
    assert label(clip, "--batch", "2").code == 0
    kept = {one.name: one.read_bytes() for one in (out / "edited").iterdir()}
    assert kept == {"clip.mp4.0.json": edited, "clip.mp4.0.meta.json": classes}
    path.write_bytes(edited)
    assert label(clip, "--batch", "2").code == 0
    assert path.read_bytes() == edited


def test_an_annotation_is_ours_though_the_video_beside_it_could_not_be_copied(
    label, clip, monkeypatch, capsys
):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "bring", full)
        out = label(clip, "--every", "3").out
    assert "No space left on device" in capsys.readouterr().err
    assert label(clip, "--every", "3").code == 0
    assert not (out / "edited").exists()


def test_a_disk_that_is_full_in_the_middle_of_a_line_loses_that_batch_only(
    label, clip, monkeypatch, capsys, tmp_path
):
    write, room = FrameJournal.append, [2]

    def append(journal, frames):
        room[0] -= 1
        if room[0] >= 0:
            write(journal, frames)
            return
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = (tmp_path / "out" / "frames.jsonl").stat().st_size
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, most))
        try:
            write(journal, frames)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            signal.signal(signal.SIGXFSZ, before)

    with monkeypatch.context() as patch:
        patch.setattr(FrameJournal, "append", append)
        stopped = label(clip, "--batch", "2")
    assert stopped.code == 1
    assert "File too large" in capsys.readouterr().err
    assert stopped.out == tmp_path / "out"
    lines = (stopped.out / "frames.jsonl").read_bytes().splitlines()
    assert all(json.loads(line) for line in lines)
    assert label(clip, "--batch", "2").code == 0


def test_a_file_that_was_removed_from_the_project_comes_back_without_asking(label, model, clip):
    out = label(clip).out
    before = project_files(out)
    (out / "project/ds0/video/clip.mp4").unlink()
    model.asked.clear()
    assert label(clip).code == 0
    assert (asked(model), project_files(out)) == ([], before)


def test_a_frame_without_an_answer_is_a_failure_and_boxes_pass_through_it(
    label, model, clip, report_of, capsys
):
    def answer(ask):
        if frame_of(color_in(ask)) == 5:
            return Failure("bad_answer", "The answer made no sense.")
        return moving_car(ask)

    model.answer = answer
    run = label(clip)
    report = report_of(run.out)
    assert (run.code, report["failed"], report["failures"]) == (
        1,
        1,
        {"5": "The answer made no sense."},
    )
    assert lefts(read_video(run.out))[5] == [5]
    assert "frame 5: The answer made no sense." in capsys.readouterr().err


def test_what_no_frame_can_be_asked_is_said_before_anything_is_written(label, model, clip, capsys):
    model.answer = lambda ask: Failure("bad_request", "The prompt is too long.")
    run = label(clip)
    assert (run.code, (run.out / "project").exists()) == (2, False)
    assert "The prompt is too long." in capsys.readouterr().err


def test_boxes_move_with_the_time_of_frames_that_come_unevenly(label, model, tmp_path):
    times_ms = [0, 40, 80, 120, 480, 520, 560, 600]

    def answer(ask):
        left = times_ms[frame_of(color_in(ask))] / 40
        return result(
            ask.task, Box((left, 4.0, left + 30, 20.0), "car", 0.9), size=ask.image.size_wh
        )

    model.answer = answer
    out = label(timed_clip(tmp_path / "clip.mp4", times_ms), "--every", "7").out
    expected = {frame: [round(time / 40)] for frame, time in enumerate(times_ms)}
    assert lefts(read_video(out)) == expected


@pytest.mark.parametrize(("degrees", "height_width"), [(90, (64, 48)), (180, (48, 64))])
def test_a_video_that_players_turn_is_labeled_as_they_show_it(
    label, model, tmp_path, degrees, height_width
):
    out = label(turned_clip(tmp_path / "clip.mp4", degrees)).out
    assert read_video(out).img_size == height_width
    # The white quarter is not in the top left corner any more.
    assert asked(model) == [0, 0]


@pytest.mark.parametrize("size_wh", [(63, 47), (17, 48), (64, 33)])
def test_odd_sizes_keep_all_their_pixels(label, tmp_path, size_wh):
    out = label(gray_clip(tmp_path / "clip.mp4", 4, size_wh)).out
    assert read_video(out).img_size == (size_wh[1], size_wh[0])


def test_of_a_cut_video_that_can_be_opened_what_is_there_is_labeled(
    label, tmp_path, report_of, capsys
):
    run = label(cut_streamable(tmp_path / "clip.mp4", COUNT))
    report = report_of(run.out)
    assert report["frames_said"] == COUNT > report["num_frames"] == report["asked"] > 0
    assert read_video(run.out).frames_count == report["num_frames"]
    assert "it may be cut" in capsys.readouterr().err


def test_damage_in_the_middle_is_counted_and_the_rest_is_labeled(label, tmp_path, report_of):
    clip = gray_clip(tmp_path / "clip.avi", COUNT, codec="mpeg4", options={"g": "1"})
    data = bytearray(clip.read_bytes())
    frames = [at for at in range(len(data)) if data.startswith(b"00dc", at)]
    for at, end in pairwise(frames[8:11]):
        data[at + 8 : end] = bytes(end - at - 8)
    clip.write_bytes(data)
    run = label(clip)
    report = report_of(run.out)
    assert run.code == 1
    assert report["damaged"] > 0
    assert report["asked"] >= COUNT - 2


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (audio_file, "has moving pictures, and 'clip.mp4' holds only audio"),
        (clip_without_frames, "has moving pictures, and 'clip.mp4' holds none"),
        (text_file, "'clip.mp4' cannot be opened as one"),
        (empty_file, "'clip.mp4' cannot be opened as one"),
        (cut_file, "'clip.mp4' cannot be opened as one"),
        (lambda path: path, "'clip.mp4' cannot be read (No such file or directory)"),
    ],
    ids=["only sound", "no frames", "text", "nothing", "cut", "not there"],
)
def test_what_is_no_video_is_refused_in_one_sentence(label, tmp_path, capsys, make, sentence):
    run = label(make(tmp_path / "clip.mp4"))
    said = capsys.readouterr().err.strip()
    assert (run.code, run.out.exists()) == (2, False)
    assert sentence in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("make", "name", "sentence"),
    [
        (
            claiming_file,
            "clip.avi",
            "at most 67 million pixels, and those of 'clip.avi' are 20000x",
        ),
        (lambda path: growing_clip(path, (0, 1, 2)), "clip.webm", "none of 'clip.webm' can be"),
    ],
    ids=["as its header says", "larger than its header says"],
)
def test_frames_that_are_too_large_are_refused_before_they_take_memory(
    label, tmp_path, capsys, make, name, sentence
):
    clip = make(tmp_path / name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = label(clip)
    said = capsys.readouterr().err.strip()
    assert (run.code, run.out.exists()) == (2, False)
    assert sentence in said
    assert len(said.splitlines()) == 1
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 250


def test_a_frame_that_is_too_large_is_one_that_is_damaged(label, tmp_path, report_of):
    run = label(growing_clip(tmp_path / "clip.webm", (1,), 4))
    report = report_of(run.out)
    assert report["asked"] == 3
    assert report["damaged"] == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--from", "9", "--to", "3"), "--from 9 --to 3 was received"),
        (("--from", "24"), "has 24 frames, not one with the number 24"),
        (("--coco",), "--coco is for a folder of images"),
        (("--draw",), "--draw is for a folder of images"),
        (("--retry-failed",), "--retry-failed is for a folder of images"),
        (("--task", "<CAPTION>"), "labeled with boxes that have a class"),
        (("--task", "<DENSE_REGION_CAPTION>"), "labeled with boxes that have a class"),
        (("--task", "<OD>+<REGION_TO_DESCRIPTION>"), "labeled with boxes that have a class"),
    ],
)
def test_what_a_video_cannot_be_asked_is_refused(label, clip, capsys, options, sentence):
    run = label(clip, *options)
    assert (run.code, run.out.exists()) == (2, False)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--every", "--from", "--to"])
def test_a_folder_of_images_has_no_frames(label, images, capsys, option):
    assert label(images, option, "3").code == 2
    assert f"{option} is for a video" in capsys.readouterr().err


def test_one_folder_holds_one_video_asked_one_way(label, clip, images, tmp_path, capsys):
    out = label(clip, "--every", "8").out
    assert label(clip, "--every", "9").code == 2
    assert "begun with every 8, not 9" in capsys.readouterr().err
    assert label(gray_clip(tmp_path / "other.mp4", 9), "--every", "8").code == 2
    assert "begun with video" in capsys.readouterr().err
    gray_clip(clip, 9)
    assert label(clip, "--every", "8").code == 2
    assert "begun with video_hash" in capsys.readouterr().err
    assert label(images).code == 2
    assert label(clip, "--every", "9", "--overwrite").code == 0
    assert read_video(tmp_path / "out.old-1").frames_count == COUNT
    assert read_video(out).frames_count == 9


def test_a_video_begins_in_an_empty_folder(label, clip, images, capsys):
    label(images)
    assert label(clip).code == 2
    assert "A video begins in an empty folder" in capsys.readouterr().err


def test_a_linked_video_takes_no_second_place_on_the_disk(label, clip):
    stored = label(clip, "--link", "--every", "8").out / "project/ds0/video/clip.mp4"
    assert stored.samefile(clip)


@pytest.mark.parametrize("library", ["av", "trackers"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    label, clip, capsys, monkeypatch, library
):
    monkeypatch.setitem(sys.modules, library, None)
    assert label(clip).code == 2
    said = capsys.readouterr().err
    assert f"'{library}' is not installed; pip install \"serve-florence-2[video]\"" in said
