"""One model at a time: freed before the next, back when the next fails, asleep when idle."""

from __future__ import annotations

import threading

import pytest

from florence2.ask import Ask
from florence2.errors import CheckpointError
from florence2.scheduler import StoppedError
from serve.deployment import Deployment, ModelChoice


class Model:
    """What a deployment needs of a model, and a diary of what happened to all of them."""

    def __init__(self, name: str, diary: list[str], engine: object, device: str = "cuda:0") -> None:
        self.name, self.diary, self.device, self.engine = name, diary, device, engine
        diary.append(f"load {name}")

    def close(self) -> None:
        self.diary.append(f"free {self.name}")


class Engine:
    """An engine that answers nothing; only its parking is looked at."""

    prompt_batch = 1

    def __init__(self, diary: list[str]) -> None:
        self.diary = diary
        self.is_lost = False

    def park(self) -> None:
        self.diary.append(f"park on {threading.current_thread().name}")

    def resume(self) -> None:
        self.diary.append("resume")


@pytest.fixture
def diary() -> list[str]:
    return []


@pytest.fixture
def models(diary):
    """A deployment whose checkpoint "broken" cannot be loaded."""

    def load(choice: ModelChoice) -> Model:
        if choice.name == "broken":
            diary.append("load broken")
            raise CheckpointError("The checkpoint is damaged.")
        return Model(choice.name, diary, Engine(diary), choice.device)

    deployment = Deployment(load=load)
    yield deployment
    deployment.stop()


def test_nothing_is_deployed_at_first(models):
    assert not models.is_deployed
    with pytest.raises(StoppedError, match="press Serve"):
        _ = models.current


def test_the_model_before_is_freed_before_the_next_is_loaded(models, diary):
    models.switch(ModelChoice("base", "cpu"))
    models.switch(ModelChoice("large", "cpu"))
    assert diary == ["load base", "free base", "load large"]
    assert models.current.choice.name == "large"


def test_the_model_before_comes_back_when_the_next_fails(models, diary):
    models.switch(ModelChoice("base", "cpu"))
    with pytest.raises(CheckpointError, match="damaged"):
        models.switch(ModelChoice("broken"))
    assert diary == ["load base", "free base", "load broken", "load base"]
    assert models.current.choice == ModelChoice("base", "cpu")


def test_a_first_model_that_fails_leaves_nothing(models):
    with pytest.raises(CheckpointError):
        models.switch(ModelChoice("broken"))
    assert not models.is_deployed


def test_a_stopped_model_is_freed_once(models, diary):
    models.switch(ModelChoice("base", "cpu"))
    models.stop()
    models.stop()
    assert diary == ["load base", "free base"]
    assert not models.is_deployed


def test_an_idle_model_moves_to_memory_and_back_on_the_models_thread(models, diary):
    models.switch(ModelChoice("base", "cuda:0"))
    assert models.freeze()
    assert models.is_frozen
    models.wake()
    models.wake()
    assert not models.is_frozen
    assert diary[2:] == ["resume"]
    assert diary[1].startswith("park on ")
    assert threading.current_thread().name not in diary[1]


def test_a_model_in_memory_has_nowhere_to_go(models, diary):
    models.switch(ModelChoice("base", "cpu"))
    assert not models.freeze()
    assert not models.is_frozen
    assert diary == ["load base"]


def test_requests_that_wait_are_refused_when_the_model_goes(deployment, image_path):
    held, go_on = threading.Event(), threading.Event()
    scheduler = deployment.current.scheduler
    threading.Thread(target=scheduler.call, args=(lambda: (held.set(), go_on.wait()),)).start()
    held.wait()
    refused: list[Exception] = []

    def wait_in_the_queue() -> None:
        try:
            scheduler.run([Ask(image_path("scene_bike.png"), "<CAPTION>")])
        except StoppedError as error:
            refused.append(error)

    waiting = threading.Thread(target=wait_in_the_queue)
    waiting.start()
    while scheduler.queue_depth == 0:
        pass
    stopping = threading.Thread(target=deployment.stop)
    stopping.start()
    go_on.set()
    for thread in (waiting, stopping):
        thread.join(20)
    assert len(refused) == 1
