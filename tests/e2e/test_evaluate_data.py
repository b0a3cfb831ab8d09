"""``florence2 evaluate DATA`` with the demo checkpoint: figures are those of its own answers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from florence2 import Ask, Florence2
from florence2.evaluation.measure import measure
from florence2.labeled.coco import read_coco
from florence2_demo.drawing import draw_scene
from florence2_demo.examples import example
from florence2_demo.scene import make_scene
from serve.cli.main import main

SCENES = 6


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    """Drawn scenes with their true boxes, as a COCO file."""
    folder = tmp_path_factory.mktemp("scenes")
    images, annotations, names = [], [], {}
    for seed in range(SCENES):
        scene = make_scene(seed)
        picture = draw_scene(scene)
        picture.save(folder / f"{seed}.png")
        size = {"width": picture.width, "height": picture.height}
        images.append({"id": seed, "file_name": f"{seed}.png", **size})
        truth = example(scene, "<OD>", np.random.default_rng(0)).truth
        for box, label in zip(truth.boxes_xyxy, truth.labels, strict=True):
            x1, y1, x2, y2 = np.array(box) * (*picture.size, *picture.size)
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": seed,
                    "category_id": names.setdefault(label, len(names) + 1),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                }
            )
    categories = [{"id": number, "name": name} for name, number in names.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "labels.json").write_text(json.dumps(content), "utf-8")
    return folder


def test_figures_are_those_of_the_engines_own_answers(labeled, tmp_path, capsys):
    out = tmp_path / "figures"
    options = ["--model", "demo", "--device", "cpu", "--beams", "1", "--batch", "4"]
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(labeled), *options, "--out", str(out)])
    assert not ended.value.code
    (part,) = json.loads((out / "evaluation.json").read_text("utf-8"))["tasks"]
    total = part["objects"]["total"]
    data = read_coco(labeled)
    asks = [Ask(image.path, "<OD>", num_beams=1) for image in data.images]
    results = Florence2.load("demo", device="cpu").run_many(asks)
    named = {i.name: r.objects for i, r in zip(data.images, results, strict=True)}
    own = measure(data, named, resamples=0).total
    # Labels are whole pixels, and of two boxes on one object one stays.
    assert total["ap50"]["value"] == pytest.approx(own.ap50.value, abs=0.05)
    assert total["recall"]["value"] == pytest.approx(own.recall.value)
    assert total["f1"]["value"] > 0.8
    assert total["overlap"]["value"] == pytest.approx(own.overlap.value, abs=0.02)
    assert "report is in" in capsys.readouterr().err
