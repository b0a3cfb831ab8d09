"""The demo checkpoint that comes with the project: its size; the reference reads it too."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from florence2 import Ask, Florence2
from florence2.engine.ask import prompt_sentence
from florence2.network.florence import Florence2Network
from florence2.records import Region
from florence2.tasks import TaskInput, find_task
from florence2_demo import checkpoint as export
from florence2_demo.checkpoint import IMAGE_ID, demo_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "demo" / "checkpoint"
IMAGE = ROOT / "demo" / "images" / "scene_bike.png"
REGION = (30.0, 60.0, 200.0, 260.0)
LIMIT = 40


@pytest.fixture(scope="module")
def model():
    return Florence2.load("demo", device="cpu")


@pytest.fixture(scope="module")
def either(load):
    """The same with each runtime."""
    return load("demo")


@pytest.fixture(scope="module")
def reference():
    transformers = pytest.importorskip("transformers")
    return transformers.Florence2ForConditionalGeneration.from_pretrained(
        FOLDER, dtype=torch.float32
    ).eval()


def test_it_is_small_and_holds_no_code():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors", ".txt"}


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(
    "token",
    ["<OD>", "<DETAILED_CAPTION>", "<OPEN_VOCABULARY_DETECTION>", "<REGION_TO_SEGMENTATION>"],
)
def test_the_reference_loads_it_and_generates_the_same_tokens(either, reference, token, num_beams):
    task = find_task(token)
    text = "orange star" if task.takes is TaskInput.TEXT else None
    region = Region(REGION) if task.takes is TaskInput.REGION else None
    ours = either.run(token, str(IMAGE), text, region, num_beams=num_beams, max_new_tokens=LIMIT)
    assert len(ours.token_ids) > 3

    checkpoint = either.engine.checkpoint
    from florence2.images import open_image

    image = open_image(str(IMAGE))
    pixels = torch.from_numpy(checkpoint.image_processor.pixels(image.image))[None]
    sentence = prompt_sentence(task, text, region, image.size_wh)
    visual = [reference.config.image_token_id] * (12 * 12 + 1)
    ids = torch.tensor([visual + checkpoint.vocabulary.encode_prompt(sentence)])
    with torch.inference_mode():
        [row] = reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            max_new_tokens=LIMIT,
            num_beams=num_beams,
        ).tolist()
    expected = [token_id for token_id in row if token_id not in (0, 1, 2)]
    assert list(ours.token_ids) == expected


@pytest.mark.parametrize("num_beams", [1, 3])
def test_no_form_of_a_product_changes_a_token_of_float32(num_beams):
    exact = Florence2.load("demo", device="cpu", precision="fp32")
    images = [str(path) for path in sorted(IMAGE.parent.glob("scene_*"))[:4]]
    asks = [Ask(image, "<OD>", num_beams=num_beams) for image in images]
    answers = {}
    for is_transposed in (False, True):
        network = exact.engine.runtime.network
        kinds = {(weight.dtype, weight.shape) for weight in network.parameters()}
        width = network.config.text.d_model
        kinds.add((network.dtype, torch.Size((3 * width, width))))
        network.take_forms(dict.fromkeys(kinds, (is_transposed,) * 60))
        answers[is_transposed] = [result.token_ids for result in exact.run_many(asks)]
    assert answers[False] == answers[True]
    assert min(map(len, answers[True])) > 3


def test_the_reference_processor_reads_its_tokenizer_and_image_settings(model):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    sentence = "Locate a red car in the image."
    assert tokenizer(sentence, add_special_tokens=False)[
        "input_ids"
    ] == model.engine.checkpoint.vocabulary.encode(sentence)


def test_n_prompts_on_a_demo_image_run_the_tower_once(either):
    encoded = either.encode(str(IMAGE))
    names = ("star", "tree", "arrow", "blue arrow")
    asks = [Ask(encoded, "<OPEN_VOCABULARY_DETECTION>", name) for name in names]
    together = either.run_many(asks)
    for ask, result in zip(asks, together, strict=True):
        assert result.token_ids == either.run(ask.task, str(IMAGE), ask.text).token_ids


def test_a_caption_cascade_grounds_what_it_said(either):
    name = "<CAPTION>+<CAPTION_TO_PHRASE_GROUNDING>"
    result = either.run(name, str(IMAGE))
    assert [step.task for step in result.steps] == name.split("+")
    assert result.text == result.steps[0].text
    assert result.objects == result.steps[1].objects
    assert set(result.to_dict()) == set(name.split("+"))


def test_a_caption_before_a_region_step_is_grounded_on_the_way(either):
    result = either.run("<CAPTION>+<REGION_TO_SEGMENTATION>", str(IMAGE), num_beams=1)
    assert [step.task for step in result.steps[:2]] == [
        "<CAPTION>",
        "<CAPTION_TO_PHRASE_GROUNDING>",
    ]
    assert len(result.steps) == 2 + len(result.steps[1].objects)


PLAIN = [
    ("<OD>", None),
    ("<CAPTION>", None),
    ("<DETAILED_CAPTION>", None),
    ("<OCR_WITH_REGION>", None),
    ("<OPEN_VOCABULARY_DETECTION>", "orange star"),
    ("<CAPTION_TO_PHRASE_GROUNDING>", "a green box and a blue arrow"),
]


@pytest.fixture(scope="module")
def processor():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoProcessor.from_pretrained(FOLDER)


@pytest.mark.parametrize(("token", "text"), PLAIN)
def test_plain_transformers_runs_it_as_it_runs_any_checkpoint(
    either, reference, processor, token, text
):
    with Image.open(IMAGE) as opened:
        picture = opened.convert("RGB")
    inputs = processor(text=token + (text or ""), images=picture, return_tensors="pt")
    with torch.inference_mode():
        [row] = reference.generate(**inputs, max_new_tokens=find_task(token).max_new_tokens)
    ours = either.run(token, str(IMAGE), text)
    assert list(ours.token_ids) == [token_id for token_id in row.tolist() if token_id > 2]
    answer = processor.decode(row, skip_special_tokens=False)
    parsed = processor.post_process_generation(answer, task=token, image_size=picture.size)
    assert parsed[token]


def test_the_reference_saves_it_and_what_it_saved_is_the_same_to_us(model, reference, tmp_path):
    reference.save_pretrained(tmp_path / "saved")
    for file in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copy(FOLDER / file, tmp_path / "saved")
    saved = Florence2.load(tmp_path / "saved", device="cpu")
    assert saved.engine.checkpoint.generation == model.engine.checkpoint.generation
    assert saved.notes == model.notes == ()
    assert saved.run("<OD>", str(IMAGE)).token_ids == model.run("<OD>", str(IMAGE)).token_ids


def test_its_config_names_the_image_token_of_its_tokenizer(model):
    checkpoint = model.engine.checkpoint
    assert checkpoint.config.image_token_id == checkpoint.vocabulary.image_id == IMAGE_ID


def test_a_training_would_write_the_same_settings_beside_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "build_tokenizer", lambda *_: None)
    monkeypatch.setattr(export, "tokenizer_texts", tuple)
    export.write_tokenizer_and_processor(tmp_path)
    export.save_checkpoint(Florence2Network(demo_config(1984)), tmp_path)
    written = sorted(path.name for path in tmp_path.glob("*.json"))
    assert len(written) == 4
    for name in written:
        assert (FOLDER / name).read_text() == (tmp_path / name).read_text(), name


@pytest.mark.parametrize("bits", [10, 14, 16])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_scene_has_the_same_labels_at_every_depth(model, bits, mode):
    scene = np.asarray(Image.open(IMAGE).convert(mode))
    deep = np.round(scene / 255 * (2**bits - 1)).astype(np.uint16)
    file = cv2.imencode(".png", deep[:, :, ::-1] if mode == "RGB" else deep)[1].tobytes()
    found = model.detect_objects(file, max_new_tokens=LIMIT)
    assert (
        found.objects
        == model.detect_objects(Image.open(IMAGE).convert(mode), max_new_tokens=LIMIT).objects
    )
    assert found.objects
