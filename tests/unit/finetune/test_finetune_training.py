"""A training learns, keeps what is best, and goes on after a kill as if nothing had happened."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from huggingface_hub.utils import WeakFileLock
from openvino_tools import write_small_checkpoint
from peft import PeftModel
from tiny_checkpoint import original_files

from florence2 import Florence2
from florence2.checkpoint.checkpoint import load_weights, open_checkpoint
from florence2.checkpoint.weights import build_network, read_weights
from florence2.errors import RequestError
from florence2.finetune import trainer
from florence2.finetune.examples import IGNORED, Examples, TokenLimits, collate, part_of
from florence2.finetune.model import make_model
from florence2.finetune.plan import FineTuningPlan, LoraSettings
from florence2.finetune.run import fine_tune, num_visual_tokens
from florence2.finetune.targets import Vocabulary
from florence2.finetune.trainer import FineTuner, TrainingError, Watcher
from florence2.labeled.records import LabeledImage, LeftOut, WantedAnswer
from florence2.runtimes.torch import normalise
from florence2.tokens import PAD_ID


class Notes(Watcher):
    """Remembers what it is told, and stops after a step if it is told to."""

    def __init__(self, stop_after=None):
        self.losses, self.sentences, self.values = [], [], []
        self._stop_after = stop_after

    def progress(self, now):
        self.losses.append((now.step, now.loss))

    def validated(self, step, found, *, is_best):
        self.values.append((step, found.value))

    def note(self, sentence):
        self.sentences.append(sentence)

    def should_stop(self):
        return bool(self.losses) and self.losses[-1][0] + 1 == self._stop_after


@pytest.fixture
def plan(tiny_folder):
    return FineTuningPlan(
        str(tiny_folder),
        ("<OD>",),
        steps=4,
        batch=2,
        rate=3e-3,
        validate_every=2,
        validation_images=2,
        device="cpu",
    )


def examples_of(plan, scenes, model):
    checkpoint = open_checkpoint(model)
    limits = TokenLimits.of(checkpoint, num_visual_tokens(checkpoint))
    return Examples(scenes[0].images, Vocabulary(scenes[0].classes), checkpoint, limits, plan)


@pytest.fixture
def batch(plan, scenes, tiny_folder):
    examples = examples_of(plan, scenes, tiny_folder)
    return collate([examples[number] for number in range(3)])


TARGETS = ("q_proj", "out_proj", "fc1", "qkv", "lm_head", "image_projection")


def with_adapter(tiny_folder, plan, **lora):
    """A model whose adapter changes something: that of a new one adds zeros."""
    torch.manual_seed(5)
    tuned = make_model(open_checkpoint(tiny_folder), replace(plan, lora=LoraSettings(**lora)))
    for name, weight in tuned.trained():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return tuned


def test_the_loss_is_that_of_the_networks_own_forward_pass(plan, tiny_folder, batch):
    tuned = with_adapter(tiny_folder, plan)
    tuned.model.eval()
    num_tokens = (batch["labels"] != IGNORED).sum()
    ours = tuned.loss(batch, num_tokens)
    image_id = tuned.florence.config.image_token_id = 1983
    image = torch.full((len(batch["image_of"]), 17), image_id)
    ids = torch.cat([image, batch["prompt_ids"]], dim=1)
    pixels = normalise(batch["scaled"], tuned.table)[batch["image_of"]]
    plain = tuned.model(
        input_ids=ids,
        pixel_values=pixels,
        attention_mask=ids.ne(PAD_ID).long(),
        labels=batch["labels"],
    ).loss
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    parts = [tuned.loss(part_of(batch, at, at + 1), num_tokens).item() for at in range(3)]
    assert sum(parts) == pytest.approx(ours.item(), rel=1e-5)


@pytest.mark.parametrize("is_rank_stabilised", [False, True])
def test_the_engine_measures_exactly_the_weights_that_are_trained(
    plan, tiny_folder, batch, is_rank_stabilised
):
    tuned = with_adapter(tiny_folder, plan, targets=TARGETS, is_rank_stabilised=is_rank_stabilised)
    state = tuned.merged_state()
    network = build_network(tuned.checkpoint.config, state)
    # The output's adapter must not leak into the embedding.
    base = read_weights(tiny_folder)["model.language_model.shared.weight"]
    assert torch.equal(state["model.language_model.shared.weight"], base)
    assert not network.is_tied
    tuned.model.eval()
    pixels = normalise(batch["scaled"], tuned.table)
    with torch.no_grad():
        visual = tuned.visual(batch)
        assert torch.allclose(network.encode_images(pixels), visual, atol=1e-4)
        merged = copy.deepcopy(tuned.model).merge_and_unload()
    for name, value in merged.state_dict().items():
        assert torch.allclose(state[name], value, atol=1e-6), name


@pytest.mark.parametrize(
    ("changes", "trains_vision", "keeps"),
    [
        ({}, True, False),
        ({"freeze_vision": True}, False, False),
        ({"freeze_vision": True, "augmentations": ()}, False, True),
        ({"method": "full", "freeze_vision": True}, False, False),
        ({"method": "full"}, True, False),
    ],
)
def test_a_tower_that_is_not_trained_has_no_gradients(
    plan, tiny_folder, batch, changes, trains_vision, keeps
):
    tuned = make_model(open_checkpoint(tiny_folder), replace(plan, **changes))
    visual = tuned.visual(batch)
    assert visual.requires_grad == tuned.has_trained_vision == trains_vision
    assert (tuned.kept is not None) == keeps
    if keeps:
        assert torch.equal(tuned.visual(batch), visual)
        # What is kept is found by its image, whatever is in the batch.
        assert torch.equal(tuned.visual(batch | {"scaled": batch["scaled"] * 0}), visual)


def test_recomputed_activations_give_the_same_gradients(plan, tiny_folder, batch):
    gradients = []
    for has_checkpointing in (False, True):
        changed = replace(plan, has_checkpointing=has_checkpointing, dropout=0.0)
        tuned = with_adapter(tiny_folder, changed)
        tuned.model.train()
        tuned.loss(batch, 10).backward()
        gradients.append([weight.grad for _, weight in tuned.trained()])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.fixture(scope="module")
def finished(tiny_folder, scenes, tmp_path_factory):
    """A training of an adapter, from its begin to its end."""
    folder = tmp_path_factory.mktemp("training") / "run"
    plan = FineTuningPlan(
        str(tiny_folder),
        ("<OD>",),
        steps=4,
        batch=2,
        rate=3e-3,
        validate_every=2,
        validation_images=2,
        device="cpu",
    )
    notes = Notes()
    record = fine_tune(*scenes, plan, folder, notes, "florence2 train <data>")
    return folder, record, notes


def test_a_training_leaves_an_adapter_its_figures_and_a_report(finished, tiny_folder):
    folder, record, notes = finished
    assert [step for step, _ in notes.losses] == [1, 2, 3, 4]
    assert [step for step, _ in notes.values] == [2, 4]
    assert record["status"] == "done"
    assert record == json.loads((folder / "training.json").read_text())
    assert record["tasks"] == ["<OD>"]
    assert record["metric"] == {"name": "mAP", "value": max(value for _, value in notes.values)}
    assert record["files"] == ["best/adapter_config.json", "best/adapter_model.safetensors"]
    config = json.loads((folder / "best" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_folder)
    assert (config["r"], config["lora_alpha"]) == (16, 32.0)
    page = (folder / "report.html").read_text()
    assert "florence2 train &lt;data&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<img") == 2


def test_its_adapter_is_peft_s_and_is_loaded_like_a_checkpoint(finished, tiny_folder, plan):
    best = finished[0] / "best"
    tuned = make_model(open_checkpoint(tiny_folder), replace(plan, method="full"))
    expected = PeftModel.from_pretrained(tuned.florence, best).merge_and_unload().state_dict()
    found = load_weights(open_checkpoint(best), torch.float32).native_state()
    name = "model.language_model.decoder.layers.0.fc1.weight"
    assert not torch.equal(found[name], read_weights(tiny_folder)[name])
    for name, value in found.items():
        assert torch.allclose(value, expected[name], atol=1e-6), name


class KilledError(Exception):
    pass


def killed_at(step):
    """A trainer whose process ends within a step, without a word."""

    class Ended(FineTuner):
        def training_step(self, *given):
            if self.state.global_step + 1 == step:
                raise KilledError
            return super().training_step(*given)

    return Ended


def test_a_training_that_was_killed_ends_as_one_that_was_not(finished, scenes, plan, tmp_path):
    whole = finished[2]
    folder = tmp_path / "run"
    with pytest.raises(KilledError):
        fine_tune(*scenes, plan, folder, Notes(), make_tuner=killed_at(4))
    # As a kill within a save leaves it.
    shutil.copytree(
        folder / "state" / "checkpoint-2", folder / "state" / "writing" / "checkpoint-3"
    )
    (folder / "state" / "writing" / "checkpoint-3" / "optimizer.pt").write_bytes(b"half")
    again = Notes()
    record = fine_tune(*scenes, plan, folder, again)
    assert again.sentences == ["Going on from step 2 of 4."]
    assert again.losses == whole.losses[2:]
    assert again.values == whole.values[1:]
    weights = [
        read_weights_of_adapter(where / "state" / "checkpoint-4") for where in (folder, finished[0])
    ]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    curves = json.loads((folder / "state" / "curves.json").read_text())
    assert [step for step, _ in curves["losses"]] == [1, 2, 3, 4]
    assert record["status"] == "done"
    assert (record["by_task"], record["best_step"]) == (
        finished[1]["by_task"],
        finished[1]["best_step"],
    )
    # Nothing is better then: what is known of the best weights stays.
    assert fine_tune(*scenes, plan, folder, Notes())["by_task"] == record["by_task"]


def read_weights_of_adapter(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_a_training_that_is_stopped_saves_and_goes_on(scenes, plan, finished, tmp_path):
    record = fine_tune(*scenes, plan, tmp_path / "run", Notes(stop_after=3))
    assert (record["status"], record["steps_done"]) == ("stopped", 3)
    again = Notes()
    fine_tune(*scenes, plan, tmp_path / "run", again)
    assert again.losses == finished[2].losses[3:]


def test_all_weights_are_trained_into_a_checkpoint_that_is_served(scenes, plan, tmp_path):
    full = replace(plan, method="full", steps=2, rate=1e-3)
    record = fine_tune(*scenes, full, tmp_path / "run", Notes())
    assert "best/model.safetensors" in record["files"]
    model = Florence2.load(tmp_path / "run" / "best", "cpu", "torch", precision="fp32")
    assert model.engine.runtime.network.is_tied
    model.close()


def test_a_batch_is_halved_where_memory_ends_and_the_step_stays_the_same(
    scenes, plan, finished, tmp_path, monkeypatch
):
    from florence2.finetune.model import FineTuned

    whole = FineTuned.loss

    def loss(self, batch, num_tokens):
        if len(batch["places"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(self, batch, num_tokens)

    monkeypatch.setattr(FineTuned, "loss", loss)
    notes = Notes()
    still = replace(plan, steps=2, dropout=0.0)
    fine_tune(*scenes, still, tmp_path / "small", notes)
    assert notes.sentences == [
        "Memory ran out: the batch of 2 images goes through the network 1 at a time now, in 2 "
        "parts that add up to the same step."
    ]
    monkeypatch.setattr(FineTuned, "loss", whole)
    other = Notes()
    fine_tune(*scenes, still, tmp_path / "large", other)
    assert [loss for _, loss in notes.losses] == pytest.approx(
        [loss for _, loss in other.losses], rel=1e-4
    )


def test_on_a_cpu_as_many_go_together_as_memory_is_free_for(scenes, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "available_bytes", lambda: 1_000_000)
    notes = Notes()
    fine_tune(*scenes, replace(plan, steps=1), tmp_path / "run", notes)
    [sentence] = notes.sentences
    assert re.search(r"An image takes 0.0 GiB, so the batch of 2 goes .* 1 at a time", sentence)


def test_what_a_pass_keeps_is_counted_without_weights_and_once():
    layer = torch.nn.Linear(100, 100)
    given = torch.ones(50, 100)
    # The layer keeps what it was given, and the sine what it was given.
    assert trainer.kept_bytes(lambda: (layer(given).sin() + layer(given)).sum()) == 2 * 50 * 400
    assert trainer.available_bytes() > 2**20


def broken_at(step, way):
    class Broken(FineTuner):
        def training_step(self, *given):
            loss = super().training_step(*given)
            if self.state.global_step + 1 == step:
                way(self)
            return loss

    return Broken


def spoil_weights(tuner):
    for _, weight in tuner.tuned.trained():
        weight.data.fill_(float("nan"))


def full_disk(tuner):
    def write(*_, **__):
        raise OSError(28, "No space left on device")

    tuner.tuned.model.save_pretrained = write


@pytest.mark.parametrize(
    ("way", "sentence"),
    [
        (spoil_weights, "not finite.*best weights so far are whole in .*best"),
        (full_disk, "could not be written .the disk is full.*nothing is half-written"),
    ],
)
def test_what_breaks_a_training_leaves_the_last_good_weights(
    scenes, plan, finished, tmp_path, way, sentence
):
    with pytest.raises(TrainingError, match=sentence):
        fine_tune(*scenes, plan, tmp_path / "run", Notes(), make_tuner=broken_at(4, way))
    kept = read_weights_of_adapter(tmp_path / "run" / "state" / "checkpoint-2")
    assert all(bool(torch.isfinite(value).all()) for value in kept.values())
    assert sorted(path.name for path in (tmp_path / "run" / "state").iterdir()) == [
        "checkpoint-2",
        "curves.json",
    ]
    again = Notes()
    fine_tune(*scenes, plan, tmp_path / "run", again)
    assert again.losses == finished[2].losses[2:]


def test_a_loss_that_is_no_number_stops_at_once(scenes, plan, tmp_path):
    spoiled = broken_at(1, spoil_weights)
    with pytest.raises(TrainingError, match="The loss is nan at step 2, so training has stopped"):
        fine_tune(*scenes, plan, tmp_path / "run", Notes(), make_tuner=spoiled)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rate": 1e-4}, "rate is 0.0001 now and was 0.003"),
        ({"steps": 8}, "steps is 8 now and was 4"),
        ({"lora": LoraSettings(rank=4)}, "lora rank is 4 now and was 16"),
        ({"tasks": ("<REGION_PROPOSAL>",)}, "tasks is"),
    ],
)
def test_a_resume_with_other_settings_is_refused(scenes, plan, finished, changes, sentence):
    with pytest.raises(RequestError, match=f"other settings: .*{sentence}"):
        fine_tune(*scenes, replace(plan, **changes), finished[0], Notes())


def test_a_resume_with_other_labels_is_refused(scenes, plan, finished):
    fewer = replace(scenes[0], images=scenes[0].images[1:])
    with pytest.raises(RequestError, match="the labels is"):
        fine_tune(fewer, scenes[1], plan, finished[0], Notes())


def without_objects(data):
    return replace(data, images=tuple(replace(one, objects=()) for one in data.images))


@pytest.mark.parametrize(
    ("change", "changes", "sentence"),
    [
        (without_objects, {}, "no labels that answer <OD>"),
        (lambda data: replace(data, images=data.images[:0]), {}, "has 0 images to train on"),
        (
            lambda data: replace(data, classes=()),
            {"tasks": ("<OPEN_VOCABULARY_DETECTION>",)},
            "<OPEN_VOCABULARY_DETECTION> asks for classes",
        ),
        (lambda data: data, {"tasks": ()}, "at least one task"),
        (lambda data: data, {"tasks": ("<REGION_TO_OCR>",)}, "<REGION_TO_OCR> needs objects"),
        # Answers of nothing would be all that is learned.
        (lambda data: data, {"tasks": ("<OCR>",)}, "no labels that answer <OCR>"),
        (lambda data: data, {"tasks": ("<OD>", "<CAPTION>")}, "no labels that answer <CAPTION>"),
        (lambda data: data, {"lora": LoraSettings(alpha=float("nan"))}, "alpha must be a number"),
        (lambda data: data, {"prompts_by_class": {"dog": "a dog"}}, "class 'dog', which the data"),
        (lambda data: data, {"method": "qlora"}, "Unknown method 'qlora'"),
        (lambda data: data, {"steps": 0}, "steps must be at least 1"),
        (lambda data: data, {"rate": 3.0}, "learning rate"),
        (lambda data: data, {"lora": LoraSettings(targets=("Conv2d",))}, "No layer .* Conv2d"),
        (lambda data: data, {"tasks": ("<OT>",)}, "Unknown task '<OT>'"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_sentence(
    scenes, plan, tmp_path, change, changes, sentence
):
    with pytest.raises(RequestError, match=sentence):
        fine_tune(change(scenes[0]), scenes[1], replace(plan, **changes), tmp_path / "run", Notes())
    assert not (tmp_path / "run").exists()


def test_one_image_alone_is_nothing_to_measure_on(scenes, plan, tmp_path):
    none = replace(scenes[1], images=())
    with pytest.raises(RequestError, match="needs at least one image besides"):
        fine_tune(scenes[0], none, plan, tmp_path / "run", Notes())


def test_a_folder_with_other_files_is_not_written_into(scenes, plan, tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(RequestError, match=r"mine.txt is a file; name another one"):
        fine_tune(*scenes, plan, tmp_path / "mine.txt", Notes())
    with pytest.raises(RequestError, match="holds other files"):
        fine_tune(*scenes, plan, tmp_path, Notes())


def test_two_trainings_do_not_write_into_one_folder(scenes, plan, tmp_path):
    (tmp_path / "out").mkdir()
    with WeakFileLock(tmp_path / "out" / ".lock"), pytest.raises(RequestError, match="at work in"):
        fine_tune(*scenes, plan, tmp_path / "out", Notes())
    assert not (tmp_path / "out" / "training.json").exists()


def test_an_answer_that_is_too_long_is_named_and_left_out(scenes, plan, tmp_path):
    long = replace(
        scenes[0].images[0], answers=(WantedAnswer("<OD>", "thing " * 200),), name="long"
    )
    data = replace(scenes[0], images=(long, *scenes[0].images[1:]))
    notes = Notes()
    record = fine_tune(data, scenes[1], replace(plan, steps=1), tmp_path / "run", notes)
    assert [one["name"] for one in record["left_out"]] == ["long"]
    assert "positions for 48" in notes.sentences[0]
    assert record["images"]["train"] == len(data.images) - 1


def test_an_image_that_is_cut_off_is_named_and_left_out(scenes, plan, tmp_path):
    cut = tmp_path / "cut.png"
    first, *others = scenes[0].images
    cut.write_bytes(first.path.read_bytes()[:400])
    given = LeftOut("other.png", "It is none.")
    data = replace(
        scenes[0], images=(replace(first, path=cut, name="cut"), *others), left_out=(given,)
    )
    notes = Notes()
    record = fine_tune(data, scenes[1], replace(plan, steps=1), tmp_path / "run", notes)
    assert [one["name"] for one in record["left_out"]] == ["other.png", "cut"]
    assert "is cut or damaged" in notes.sentences[0]
    assert record["images"]["train"] == len(others)
    only = replace(data, images=data.images[:1])
    with pytest.raises(RequestError, match="on one side none can be read"):
        fine_tune(only, scenes[1], replace(plan, steps=1), tmp_path / "none", Notes())


def test_what_a_kill_left_of_the_first_file_or_between_two_weights_is_mended(
    scenes, plan, finished, tmp_path
):
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "training.json.7.new").touch()
    assert fine_tune(*scenes, replace(plan, steps=1), begun, Notes())["status"] == "done"
    run = shutil.copytree(finished[0], tmp_path / "run")
    (run / "best").rename(run / "state" / "writing-old")
    fine_tune(*scenes, plan, run, Notes())
    weights = [read_weights_of_adapter(folder / "best") for folder in (run, finished[0])]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_what_stays_without_effect_is_said(scenes, plan, tmp_path):
    notes = Notes()
    lora = LoraSettings(targets=("q_proj", "o_proj"))
    more = replace(scenes[0], classes=(*scenes[0].classes, "unicorn"))
    fine_tune(more, scenes[1], replace(plan, steps=1, lora=lora), tmp_path / "run", notes)
    assert notes.sentences == [
        "No image to learn from has an object of unicorn; what they look like is not learned.",
        "No layer is called o_proj, so it gets no adapter.",
    ]


def test_pairs_are_learned_as_they_are_written(scenes, plan, tmp_path):
    def paired(one):
        answers = (WantedAnswer("<DocVQA>What is it?", "a car"), WantedAnswer("<OD>", "car"))
        return LabeledImage(one.path, one.name, one.size_wh, answers=answers)

    both = (replace(data, images=tuple(map(paired, data.images))) for data in scenes)
    record = fine_tune(*both, replace(plan, tasks=(), steps=1), tmp_path / "run", Notes())
    assert [one["task"] for one in record["by_task"]] == ["pairs", "<OD>"]


def with_answer(data, *answers):
    return replace(data, images=tuple(replace(one, answers=answers) for one in data.images))


def test_pairs_that_cannot_be_asked_do_not_end_a_training_on_its_way(scenes, plan, tmp_path):
    plan = replace(plan, tasks=(), steps=1)
    short, long = WantedAnswer("<DocVQA>What?", "a car"), WantedAnswer("<DocVQA>" + "a " * 99, "b")
    data = [with_answer(one, short, long) for one in scenes]
    record = fine_tune(*data, plan, tmp_path / "run", Notes())
    assert record["by_task"][0]["count"] == len(scenes[1].images[: plan.validation_images])
    bare = [with_answer(one, WantedAnswer("What is it?", "a car")) for one in scenes]
    with pytest.raises(RequestError, match="does not begin with a task"):
        fine_tune(*bare, plan, tmp_path / "bare", Notes())
    assert not (tmp_path / "bare").exists()


def test_examples_come_in_the_same_order_and_each_before_any_again(scenes, plan, tiny_folder):
    long = replace(plan, steps=20)
    count = len(scenes[0].images)
    places = [examples_of(long, scenes, tiny_folder)[at].place for at in range(2 * count)]
    assert sorted(places[:count]) == sorted(places[count:]) == list(range(count))
    assert places[:count] != places[count:]
    one, other = (examples_of(long, scenes, tiny_folder)[count + 1] for _ in range(2))
    assert (one.scaled == other.scaled).all()
    assert one.questions == other.questions


def test_an_output_projection_of_its_own_stays_apart(tmp_path, scenes, plan):
    folder = write_small_checkpoint(tmp_path / "untied", is_tied=False)
    full = replace(plan, model=str(folder), method="full", steps=1, rate=1e-6)
    fine_tune(*scenes, full, tmp_path / "run", Notes())
    state = read_weights(tmp_path / "run" / "best")
    before = read_weights(folder)
    assert state["lm_head.weight"].shape == before["lm_head.weight"].shape
    assert not torch.equal(state["lm_head.weight"], state["model.language_model.shared.weight"])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_checkpoint_in_the_original_layout_is_trained_as_in_the_native_one(
    scenes, plan, tiny_folder, tmp_path, method
):
    files = original_files(load_weights(open_checkpoint(tiny_folder), torch.float32))
    folder = shutil.copytree(tiny_folder, tmp_path / "original")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / name).write_bytes(files[name])
    values = []
    for number, model in enumerate((folder, tiny_folder)):
        notes = Notes()
        given = replace(plan, model=str(model), method=method, steps=2)
        fine_tune(*scenes, given, tmp_path / f"run-{number}", notes)
        values.append([loss for _, loss in notes.losses])
        best = load_weights(open_checkpoint(tmp_path / f"run-{number}" / "best"), torch.float32)
        values[-1] += [value.abs().sum().item() for value in best.native_state().values()]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
