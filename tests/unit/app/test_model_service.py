"""The model that is served: what can be deployed, one at a time, back when the next fails, idle."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from florence2.engine.ask import Ask
from florence2.errors import (
    CheckpointError,
    DeviceError,
    FlorenceError,
    RequestError,
    StoppedError,
)
from florence2.runtimes.openvino import cpu_computes_int8
from serve import model_service
from serve.model_service import (
    Deployment,
    IdleTimer,
    ModelChoice,
    check_runtime,
    deployable_on,
    device_name,
    named_model,
    params_from_state,
)
from serve.sdk import sly

MODELS = json.loads(Path(model_service.__file__).with_name("models.json").read_text())


def test_a_request_names_a_model_in_any_case():
    params = params_from_state({"model_name": "florence-2-BASE"}, MODELS)
    assert params["model_files"] == {"checkpoint": "Florence-2-base"}
    assert params["runtime"] == "auto"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "Florence-2-large"),
        ({"deploy_params": None}, "Florence-2-large"),
        ({"deploy_params": {"model_files": {"checkpoint": "Florence-2-base-ft"}}}, "-base-ft"),
        ({"deploy_params": {"model_info": {"meta": {"model_name": "Florence-2-large-ft"}}}}, "-ft"),
    ],
)
def test_the_model_is_found_wherever_clients_name_it(given, name):
    params = params_from_state(given, MODELS)
    assert params["model_files"]["checkpoint"].endswith(name)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"model_name": "Florence-2-huge"}, "Florence-2-large"),
        ({"model_name": 7}, "7"),
        ({"deploy_params": "cpu"}, "deploy_params"),
        ({"deploy_params": {"device": 0}}, "device"),
        ({"deploy_params": {"runtime": "TensorRT"}}, "PyTorch"),
        ({"deploy_params": {"device": "cpu", "precision": "fp17"}}, "fp16"),
        ({"deploy_params": {"device": "cpu", "precision": "fp16"}}, "for GPUs"),
        ({"deploy_params": {"device": "cpu", "precision": 16}}, "auto, fp32"),
        ({"deploy_params": {"model_source": "External models"}}, "model_name"),
        ({"deploy_params": {"model_files": "x", "model_info": "y"}, "model_name": "z"}, "'z'"),
    ],
)
def test_what_cannot_be_deployed_is_said(state, says):
    with pytest.raises(FlorenceError, match=says) as refused:
        params_from_state(state, MODELS)
    assert isinstance(refused.value, RequestError | DeviceError)


def test_a_precision_that_nobody_names_is_left_to_the_app():
    params = [
        params_from_state({"deploy_params": {"device": "cpu", **named}}, MODELS)
        for named in ({}, {"precision": None}, {"precision": ""}, {"precision": "bf16"})
    ]
    assert [one.get("precision", "none") for one in params] == ["none", "none", "none", "bf16"]


def test_what_can_be_deployed_depends_on_the_device():
    assert deployable_on("cpu") == {
        "runtimes": ["auto", "torch", "openvino"],
        "precisions": ["auto", "fp32", "bf16", *["int8"] * cpu_computes_int8()],
    }


@pytest.mark.parametrize(
    ("precision", "says"), [("nf4", "is for GPUs"), ("int4", "Unknown precision"), (8, "'8'")]
)
def test_a_precision_that_cannot_be_had_is_said_before_anything_is_loaded(precision, says):
    with pytest.raises(DeviceError, match=says):
        params_from_state({"deploy_params": {"device": "cpu", "precision": precision}}, MODELS)


def test_another_checkpoint_must_be_allowed_by_its_exact_name():
    allowed = ("demo", "someone/fine-tune")
    params = params_from_state({"model_name": "someone/fine-tune"}, MODELS, allowed)
    assert params["model_files"] == {"checkpoint": "someone/fine-tune"}
    assert params["model_info"]["meta"]["model_name"] == "someone/fine-tune"
    for other in ("someone/other", "someone/fine-tune@main", "/", "..", ["someone/fine-tune"]):
        with pytest.raises(RequestError, match=r"someone/fine-tune.*--allow-deploy"):
            params_from_state({"model_name": other}, MODELS, allowed)


def test_rows_of_the_table_are_not_changed_by_a_deployment():
    row = named_model("Florence-2-base", MODELS)
    row["meta"] = None
    assert named_model("Florence-2-base", MODELS)["meta"]


@pytest.mark.parametrize(
    ("runtime", "expected"),
    [
        (None, "auto"),
        ("", "auto"),
        ("AUTO", "auto"),
        ("pytorch", "PyTorch"),
        ("PyTorch", "PyTorch"),
        ("torch", "PyTorch"),
        ("openvino", "OpenVINO"),
        ("OpenVINO", "OpenVINO"),
    ],
)
def test_the_runtime_has_one_name(runtime, expected):
    assert check_runtime(runtime) == expected


def test_a_request_names_runtime_and_precision():
    given = {"deploy_params": {"device": "cpu", "runtime": "openvino", "precision": "INT8"}}
    params = params_from_state({**given, "model_name": "Florence-2-base"}, MODELS)
    assert (params["runtime"], params["precision"]) == ("OpenVINO", "int8")
    given["deploy_params"]["precision"] = "int7"
    with pytest.raises(DeviceError, match="int8"):
        params_from_state(given, MODELS)


def test_a_device_nobody_chose_is_chosen(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert [device_name(one) for one in (None, "", "auto", "cuda:1")] == ["cpu"] * 3 + ["cuda:1"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert device_name(None) == "cuda:0"


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


def test_what_is_a_fine_tunes_own_comes_and_goes_with_it(models):
    kite, boat = (sly.ObjClass(name, sly.Rectangle) for name in ("kite", "boat"))

    def own() -> tuple[list[str], dict[str, object]]:
        return [one.name for one in models.own_classes()], dict(models.own_settings)

    assert own() == ([], {})
    kites = {"own_classes": (kite,), "own_settings": {"task_prompt": "<OD>"}}
    models.switch(ModelChoice("kites", "cpu", **kites))
    with pytest.raises(CheckpointError):
        models.switch(ModelChoice("broken", own_classes=(boat,), own_settings={"text": "boat"}))
    assert own() == (["kite"], {"task_prompt": "<OD>"})
    models.switch(ModelChoice("base", "cpu"))
    assert own() == ([], {})
    models.switch(ModelChoice("kites", "cpu", **kites))
    models.stop()
    assert own() == ([], {})


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
    assert "moved to memory" in models.freeze()
    assert "in memory already" in models.freeze()
    assert models.is_frozen
    models.wake()
    models.wake()
    assert not models.is_frozen
    assert diary[2:] == ["resume"]
    assert diary[1].startswith("park on ")
    assert threading.current_thread().name not in diary[1]


def test_whoever_frees_the_device_while_another_model_is_loaded_is_told_at_once():
    loads, go_on = threading.Event(), threading.Event()

    def load(choice):
        loads.set()
        go_on.wait(30)
        raise CheckpointError("damaged")

    models = Deployment(load=load)
    loading = threading.Thread(target=models.switch, args=(ModelChoice("base"),), daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda _: None)
        loading.start()
        try:
            assert loads.wait(30)
            with pytest.raises(StoppedError, match="press Serve"):
                models.freeze()
        finally:
            go_on.set()
            loading.join()


def test_a_model_in_memory_has_nowhere_to_go(models, diary):
    models.switch(ModelChoice("base", "cpu"))
    assert "no device to free" in models.freeze()
    assert not models.is_frozen
    assert diary == ["load base"]


def test_requests_that_wait_are_refused_when_the_model_goes(deployment, busy_model, image_path):
    scheduler = deployment.current.scheduler
    refused: list[Exception] = []

    def wait_in_the_queue() -> None:
        try:
            scheduler.run([Ask(image_path("scene_bike.png"), "<CAPTION>")])
        except StoppedError as error:
            refused.append(error)

    waiting = threading.Thread(target=wait_in_the_queue)
    stopping = threading.Thread(target=deployment.stop)
    with busy_model(scheduler):
        waiting.start()
        while scheduler.queue_depth == 0:
            pass
        stopping.start()
    for thread in (waiting, stopping):
        thread.join(20)
    assert len(refused) == 1


class Failing:
    """A deployment whose models' devices fail when the test says so."""

    def __init__(self, diary: list[str]) -> None:
        self.diary, self.is_over, self.sentences = diary, threading.Event(), list[str]()
        self.can_load = True
        self.before_load = lambda: None
        self.deployment = Deployment(load=self._load, on_hopeless=self._give_up)

    def _load(self, choice: ModelChoice) -> Model:
        self.before_load()
        if not self.can_load:
            self.diary.append(f"load {choice.name} in vain")
            raise RuntimeError("CUDA error: device-side assert triggered")
        return Model(choice.name, self.diary, Engine(self.diary), choice.device)

    def _give_up(self, sentence: str) -> None:
        self.sentences.append(sentence)
        self.is_over.set()

    def fail(self) -> None:
        """The device fails; returns once the model was loaded again, or nothing helps."""
        lost = self.deployment.current
        lost.model.engine.is_lost = True
        assert not self.deployment.is_ready
        lost.scheduler.call(lambda: None)
        for _ in range(2000):
            if self.is_over.wait(0.01) or (
                self.deployment.is_deployed and self.deployment.current is not lost
            ):
                return
        pytest.fail("nothing was done about the device")


@pytest.fixture
def failing(diary):
    made = Failing(diary)
    made.deployment.switch(ModelChoice("base"))
    yield made
    made.deployment.stop()


def test_a_model_whose_device_failed_is_loaded_again_once(failing, diary, caplog):
    failing.fail()
    assert diary == ["load base", "free base", "load base"]
    assert failing.deployment.is_ready
    assert "was loaded again" in caplog.text
    failing.fail()
    assert diary == ["load base", "free base", "load base", "free base"]
    assert not failing.deployment.is_ready
    assert ["start it anew" in sentence for sentence in failing.sentences] == [True]


def test_a_model_that_cannot_be_loaded_again_is_the_end_and_requests_are_told_so(failing, caplog):
    failing.can_load = False
    failing.fail()
    assert failing.diary == ["load base", "free base", "load base in vain"]
    assert len(failing.sentences) == 1
    with pytest.raises(StoppedError, match="start it anew"):
        _ = failing.deployment.current
    assert failing.sentences[0] in caplog.text


def test_while_the_model_is_loaded_again_requests_are_told_so(failing):
    told: list[str] = []

    def asked_meanwhile() -> None:
        with pytest.raises(StoppedError) as caught:
            _ = failing.deployment.current
        told.append(str(caught.value))

    failing.before_load = asked_meanwhile
    failing.fail()
    assert "loaded again" in told[0]


def test_another_model_may_fail_and_be_loaded_again_too(failing, diary):
    failing.fail()
    failing.deployment.switch(ModelChoice("large"))
    failing.fail()
    assert diary[-3:] == ["load large", "free large", "load large"]
    assert failing.sentences == []


def test_a_model_that_was_exchanged_meanwhile_is_left_alone(failing, diary):
    failing.deployment.switch(ModelChoice("large"))
    failing.deployment.reload()
    assert diary == ["load base", "free base", "load large"]
    assert failing.deployment.current.choice.name == "large"


def test_a_timer_acts_once_when_nothing_happens_and_again_after_the_next_touch():
    acted = threading.Semaphore(0)
    timer = IdleTimer(acted.release)
    for _ in range(2):
        timer.touch(0.05)
        assert acted.acquire(timeout=10)
    assert not acted.acquire(timeout=0.2)


def test_many_threads_share_one_timer():
    timer = IdleTimer(lambda: None)
    before = threading.active_count()
    callers = [threading.Thread(target=timer.touch, args=(60.0,)) for _ in range(50)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert threading.active_count() <= before + 1
    timer.cancel()


def test_a_cancelled_timer_does_not_act():
    acted = threading.Event()
    timer = IdleTimer(acted.set)
    timer.touch(0.2)
    timer.cancel()
    assert not acted.wait(0.5)


def test_an_action_that_fails_does_not_end_the_timer():
    acted = threading.Semaphore(0)

    def fail() -> None:
        acted.release()
        raise OSError("no device")

    timer = IdleTimer(fail)
    for _ in range(2):
        timer.touch(0.01)
        assert acted.acquire(timeout=10)


def test_a_folder_of_this_machine_is_no_path_in_team_files(tmp_path, monkeypatch):
    monkeypatch.setattr(model_service, "EXPERIMENTS", str(tmp_path))
    folder = tmp_path / "run" / "best"
    folder.mkdir(parents=True)
    here = model_service.params_for_name(str(folder), [], "cpu")
    assert here["model_source"] == model_service.PRETRAINED
    there = model_service.params_for_name(f"{tmp_path}/1_Florence-2/checkpoints/best.pt", [], "cpu")
    assert there["model_source"] == model_service.CUSTOM
