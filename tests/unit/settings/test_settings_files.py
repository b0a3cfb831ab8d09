"""The settings file and its page are what the tables say, and what the SDK can stand."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import yaml
from settings_tools import DEFAULTS, merged
from supervisely.nn.model.model_api import ModelAPI

from florence2.tasks import TASKS
from serve.sdk import sly
from serve.settings import Settings
from serve.settings.generated import DOCS_FILE, LEFT_OUT, YAML_FILE, docs_text, yaml_text
from serve.settings.schema import KEYS, LET_THROUGH, SPELLINGS


@pytest.mark.parametrize(
    ("path", "text"),
    [pytest.param(YAML_FILE, yaml_text, id="file"), pytest.param(DOCS_FILE, docs_text, id="page")],
)
def test_the_generated_text_is_not_stale(path, text):
    assert path.read_text(encoding="utf-8") == text(), "run python -m serve.settings"


def test_the_file_has_every_spelling_once_but_for_those_the_sdk_trips_over():
    names = [name for names in SPELLINGS.values() for name in names]
    assert len(names) == len(set(names))
    assert set(DEFAULTS) == {*names, "existing_objects_iou_thresh"} - LEFT_OUT
    assert not set(names) & LET_THROUGH.keys()


def test_the_file_names_every_task_and_ends_with_the_keys_of_other_clients():
    text = YAML_FILE.read_text(encoding="utf-8")
    edited, others = text.split("# Understood for other clients")
    assert all(task.token in edited for task in TASKS)
    assert set(yaml.safe_load(others.split("\n", 1)[1]).values()) == {None}


def test_every_field_of_the_settings_is_a_key_of_the_file_or_made_of_others():
    assert set(Settings.model_fields) <= KEYS.keys() | {"reference", "is_one_class"}
    assert all(field.description for field in Settings.model_fields.values())


def test_the_sdks_own_batch_path_takes_the_file_as_it_is():
    images = [np.zeros((4, 6, 3), np.uint8)]
    settings = merged({})

    class Served:
        def predict_batch(self, images_np, settings):
            return [[] for _ in images_np]

        def _predictions_to_annotation(self, image, prediction, classes_whitelist):
            return sly.Annotation(image.shape[:2])

    annotations = sly.nn.inference.Inference._inference_batched(
        Served(), source=images, settings=settings, data_to_return=[]
    )
    assert [annotation.img_size for annotation in annotations] == [(4, 6)]


def test_every_argument_of_the_sdks_predict_may_arrive_as_a_setting():
    sources = {"self", "input", "image_id", "video_id", "dataset_id", "project_id", "kwargs"}
    arguments = inspect.signature(ModelAPI.predict).parameters.keys() - sources
    known = {name for names in SPELLINGS.values() for name in names} | LET_THROUGH.keys()
    assert arguments <= known
