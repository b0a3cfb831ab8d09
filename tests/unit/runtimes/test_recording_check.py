"""Recorded work is used only where it gives the tokens of the same work unrecorded."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from recorders import TapingRecorder

from florence2.checkpoint.checkpoint import load_weights, open_checkpoint
from florence2.engine import loading as self_test
from florence2.engine.answering import answer_all
from florence2.engine.ask import Ask
from florence2.engine.engine import Engine
from florence2.engine.loading import check_recordings
from florence2.images import open_image
from florence2.runtimes.cuda_graphs import GraphRunner
from florence2.runtimes.torch import TorchRuntime


class Wrong(TapingRecorder):
    """From the n-th recording on, a replay does nothing."""

    def __init__(self, from_recording):
        super().__init__()
        self._right = from_recording

    def record(self, work):
        recording = super().record(work)
        self._right -= 1
        if self._right < 0:
            recording._operations = []
        return recording


class Failing(TapingRecorder):
    """The n-th recording cannot be made."""

    def __init__(self, recording):
        super().__init__()
        self._left = recording

    def record(self, work):
        self._left -= 1
        self.refuse = self._left < 0
        return super().record(work)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """Long enough for steps to be recorded, replayed, and joined."""
    monkeypatch.setattr(self_test, "_TOKENS", 8)


def engine_with(folder, recorder):
    checkpoint = open_checkpoint(folder)
    network = load_weights(checkpoint, torch.float32)
    runtime = TorchRuntime(network, torch.device("cpu"), "fp32", GraphRunner(recorder))
    return Engine(checkpoint, runtime, image_batch=2, prompt_batch=8, cache_bytes=2**24)


def test_right_recordings_stay_and_are_used(checkpoint_folder, caplog):
    recorder = TapingRecorder()
    engine = engine_with(checkpoint_folder, recorder)
    check_recordings(engine, engine.runtime.graphs)
    assert engine.runtime.graphs.is_enabled
    kinds = {key[0] for key in engine.runtime.graphs.keys}
    assert kinds == {"vision", "prompts", "decode"}
    assert "replay" in recorder.events
    assert caplog.messages == []


@pytest.mark.parametrize("recorder", [Wrong(0), Wrong(2), Failing(2)])
def test_a_wrong_or_failing_recording_ends_recording_and_not_the_engine(
    checkpoint_folder, caplog, recorder
):
    engine = engine_with(checkpoint_folder, recorder)
    with caplog.at_level(logging.WARNING):
        check_recordings(engine, engine.runtime.graphs)
    assert not engine.runtime.graphs.is_enabled
    assert [message[:15] for message in caplog.messages] == ["CUDA graphs are"]
    plain = engine_with(checkpoint_folder, None)
    assert answer(engine) == answer(plain)


def answer(engine):
    picture = np.random.default_rng(3).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    [encoded] = engine.encode([open_image(picture)])
    [result] = answer_all(engine, [Ask(encoded, "<OD>", max_new_tokens=64)])
    return result.token_ids
