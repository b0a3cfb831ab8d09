"""Objects followed through frames, with what was found given: no model and no files."""

from __future__ import annotations

import pytest

from florence2_demo.clips import make_clip
from serve.video.frames import Place
from serve.video.journal import Detection, Seen
from serve.video.tracking import find_tracks, followed_frames

RATE = 25


def seen_at(index: int, *found: Detection, every: int = 1, failed=None) -> Seen:
    first = max(0, index - every + 1)
    times = tuple(frame / RATE for frame in range(first, index + 1))
    return Seen(Place(index, index, times[-1]), times, found=found, failed=failed)


def car(left: float, score: float = 0.9, kind: str = "car") -> Detection:
    return Detection(kind, (left, 10.0, left + 40, 40.0), score)


def followed(seen: list[Seen], every: int = 1):
    """The kept tracks, and for each frame the boxes by the number of their object."""
    tracks, alone = find_tracks(seen, RATE / every)
    frames = {
        frame.index: {tracks[key].number: box for key, box in frame.boxes.items()}
        for frame in followed_frames(seen, tracks, RATE / every)
    }
    return list(tracks.values()), frames, alone


@pytest.mark.parametrize("seed", [0, 1, 3, 5])
@pytest.mark.parametrize("every", [1, 5])
def test_things_that_move_cross_and_leave_have_one_number_each(seed, every):
    clip = make_clip(seed)
    seen = [
        seen_at(
            index,
            *(Detection(kind, box, 0.9) for kind, box in clip.truth(index).values()),
            every=every,
        )
        for index in range(0, clip.num_frames, every)
    ]
    tracks, frames, alone = followed(seen, every)
    assert sorted(track.class_name for track in tracks) == sorted(
        mover.kind for mover in clip.movers
    )
    assert alone == 0
    owners: dict[int, set[int]] = {}
    for index in range(0, clip.num_frames, every):
        by_box = {box: number for number, (_, box) in clip.truth(index).items()}
        for number, box in frames.get(index, {}).items():
            if box in by_box:
                owners.setdefault(number, set()).add(by_box[box])
    assert all(len(movers) == 1 for movers in owners.values())


def test_boxes_between_two_asked_frames_move_straight():
    _, frames, _ = followed([seen_at(0, car(0)), seen_at(4, car(20), every=4)], every=4)
    assert [frames[index][1][0] for index in range(5)] == [0, 5, 10, 15, 20]


@pytest.mark.parametrize("reason", [None, ("bad_answer", "It made no sense.")])
def test_an_object_that_is_missed_or_not_answered_for_was_there(reason):
    seen = [
        seen_at(index, *(() if index == 3 else (car(2.0 * index),)))
        if index != 3 or reason is None
        else seen_at(3, failed=reason)
        for index in range(6)
    ]
    (track,), frames, _ = followed(seen)
    assert (track.num_found, frames[3][1][0]) == (5, 6.0)


def test_an_object_that_comes_back_after_a_second_is_another_one():
    seen = [seen_at(index, *((car(0),) if index < 10 or index > 50 else ())) for index in range(60)]
    tracks, frames, _ = followed(seen)
    assert [track.number for track in tracks] == [1, 2]
    assert sorted(frames) == [*range(10), *range(51, 60)]


def test_two_classes_in_one_place_are_two_objects():
    seen = [seen_at(index, car(index), car(index, kind="van")) for index in range(4)]
    tracks, frames, _ = followed(seen)
    assert [(track.number, track.class_name) for track in tracks] == [(1, "car"), (2, "van")]
    assert all(len(boxes) == 2 for boxes in frames.values())


def test_the_score_of_an_object_is_the_mean_of_its_boxes():
    (track,), _, _ = followed([seen_at(index, car(0, 0.5 + index / 10)) for index in range(3)])
    assert track.score == pytest.approx(0.6)


def test_in_a_range_of_one_frame_every_box_is_an_object():
    tracks, frames, alone = followed([seen_at(0, car(0), car(100))])
    assert (len(tracks), len(frames[0]), alone) == (2, 2, 0)


def test_frames_are_given_out_soon_so_that_memory_does_not_grow_with_the_video():
    taken = 0

    def frames():
        nonlocal taken
        for index in range(1500):
            taken = index
            # One comes and goes every hundred frames, the other one stays.
            yield seen_at(index, car(0), *([car(100)] if index % 100 < 60 else []))

    tracks, _ = find_tracks(frames(), RATE)
    delays = [taken - frame.index for frame in followed_frames(frames(), tracks, RATE)]
    assert len(delays) == 1500
    assert max(delays) <= 2 * RATE + 1
