from __future__ import annotations

import json

import pytest
import yaml

from florence2.errors import RequestError
from serve.labeling.settings import journal_settings, label_settings
from serve.predict.predictor import questions_of
from serve.settings import parse_settings

GROUNDING = "<CAPTION_TO_PHRASE_GROUNDING>"


def asked(**words):
    settings = label_settings(**words)
    questions = [(one.text, one.class_name) for one in questions_of(settings)]
    return settings.task_prompt, questions, list(dict.fromkeys(settings.classes_by_phrase.values()))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param({}, ("<OD>", [(None, None)], []), id="nothing said: detection"),
        pytest.param(
            {"prompt": "red car. dog"},
            (GROUNDING, [("red car", None), ("dog", None)], ["red car", "dog"]),
            id="phrases end at full stops",
        ),
        pytest.param(
            {"prompt": "Dog. dog.  the dog ."}, (GROUNDING, [("Dog", None)], ["Dog"]),
            id="one phrase once, as first typed",
        ),
        pytest.param(
            {"prompt": "3.5 inch disk.\nU.S.A flag"},
            (GROUNDING, [("3.5 inch disk", None), ("U.S.A flag", None)],
             ["3.5 inch disk", "U.S.A flag"]),
            id="a full stop inside a word is none",
        ),
        pytest.param(
            {"prompt": "St. Bernard. Dr. No. mr. J. Smith; red car, dog"},
            (GROUNDING,
             [("St. Bernard", None), ("Dr. No. mr. J. Smith", None), ("red car, dog", None)],
             ["St. Bernard", "Dr. No. mr. J. Smith", "red car, dog"]),
            id="an abbreviation ends no phrase, a semicolon does, a comma does not",
        ),
        pytest.param(
            {"classes": ["dog=puppy,hound", "cat"]},
            (GROUNDING, [("puppy", "dog"), ("hound", "dog"), ("cat", "cat")], ["dog", "cat"]),
            id="several prompts, one class",
        ),
        pytest.param(
            {"prompt": "puppy. car", "classes": ["dog=puppy"]},
            (GROUNDING, [("puppy", "dog"), ("car", None)], ["dog", "car"]),
            id="a mapped phrase is asked once",
        ),
        pytest.param(
            {"task": "od", "classes": ["vehicle=car,truck"]}, ("<OD>", [(None, None)], ["vehicle"]),
            id="without text a class renames labels",
        ),
        pytest.param(
            {"task": "open_vocabulary_detection", "prompt": "a. b"},
            ("<OPEN_VOCABULARY_DETECTION>", [("a", None), ("b", None)], ["a", "b"]),
            id="an article alone is a phrase",
        ),
        pytest.param(
            {"task": "<CAPTION>+<CAPTION_TO_PHRASE_GROUNDING>"},
            ("<CAPTION>+<CAPTION_TO_PHRASE_GROUNDING>", [(None, None)], []), id="cascade",
        ),
        pytest.param(
            {"prompt": "a red cat<and>a dog"},
            (GROUNDING, [("a red cat<and>a dog", None)], ["a red cat<and>a dog"]),
            id="the model's own joint is allowed",
        ),
    ],
)  # fmt: skip
def test_words_become_prompts_and_classes(words, expected):
    assert asked(**words) == expected


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        pytest.param({"prompt": ""}, "names none", id="empty prompt"),
        pytest.param({"prompt": " . .. "}, "names none", id="only full stops"),
        pytest.param({"prompt": "x" * 10_000}, "has 10000", id="10,000 characters"),
        pytest.param({"prompt": ". ".join(f"w{n}" for n in range(101))}, "got 101", id="phrases"),
        pytest.param({"prompt": "<OD> cat"}, "holds the token '<OD>'", id="another task's token"),
        pytest.param({"prompt": "cat <loc_12>"}, "'<loc_12>'", id="a location"),
        pytest.param({"prompt": "</s> cat"}, "'</s>'", id="the end token"),
        pytest.param({"task": "<OD>", "prompt": "cat"}, "takes no text", id="text for no text"),
        pytest.param({"task": GROUNDING}, "needs to be told", id="no text"),
        pytest.param({"task": "<REGION_TO_OCR>"}, "got none", id="no region"),
        pytest.param({"region": "1,2,3,4"}, "takes no region", id="region for no region"),
        pytest.param({"task": "region_ocr", "region": "1,2,3"}, "'1,2,3'", id="three numbers"),
        pytest.param({"task": "region_ocr", "region": "9,2,3,4"}, "x1 < x2", id="inverted"),
        pytest.param({"task": "region_ocr", "region": "a,b,c,d"}, "'a,b,c,d'", id="letters"),
        pytest.param({"task": "region_ocr", "region": "nan,0,3,4"}, "finite", id="not a number"),
        pytest.param({"task": "region_ocr", "region": "0,0,inf,4"}, "finite", id="infinite"),
        pytest.param({"task": "object_detect"}, "Did you mean", id="unknown task"),
        pytest.param({"task": "<OCR>+<CAPTION>"}, "takes neither", id="impossible cascade"),
        pytest.param({"classes": ["=x"]}, "'=x'", id="class without a name"),
        pytest.param({"classes": ["dog=,"]}, "'dog=,'", id="class without prompts"),
        pytest.param({"classes": ["a1=x", "b1=x"]}, "'a1' and 'b1'", id="prompt of two classes"),
        pytest.param({"num_beams": 99}, "num_beams must be", id="beams"),
        pytest.param({"threshold": 1.5}, "between 0 and 1", id="threshold"),
        pytest.param({"threshold": float("nan")}, "between 0 and 1", id="threshold nan"),
    ],
)
def test_each_wrong_word_gets_one_sentence(words, sentence):
    with pytest.raises(RequestError, match=r".") as error:
        label_settings(**words)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_region_is_read_in_pixels():
    settings = label_settings(task="region_category", region="1, 2.5,30,40")
    assert settings.regions == ((1.0, 2.5, 30.0, 40.0),)


@pytest.mark.parametrize(
    ("words", "raw"),
    [
        pytest.param({"tiling": "512"}, {"tiling": 512}, id="tiling by one number"),
        pytest.param(
            {"tiling": "{width: 400, height: 300, overlap: 50, full_image: false}"},
            {"tiling": {"width": 400, "height": 300, "overlap": 50, "full_image": False}},
            id="tiling by a mapping",
        ),
        pytest.param({"nms": "off"}, {"nms_threshold": "off"}, id="no NMS"),
        pytest.param({"nms": "0.5"}, {"nms_threshold": 0.5}, id="NMS"),
        pytest.param({"geometry": "bitmap"}, {"geometry": "bitmap"}, id="bitmaps"),
        pytest.param(
            {"class_thresholds": ["dog=0.6", "a=b=0.2"]},
            {"class_thresholds": {"dog": 0.6, "a=b": 0.2}},
            id="thresholds of classes",
        ),
    ],
)
def test_settings_of_the_server_are_options(words, raw):
    assert label_settings(**words) == parse_settings(raw)


FILE = """
task: <OPEN_VOCABULARY_DETECTION>
text_prompt: cat. dog
conf: 0.2
class_thresholds: {cat: 0.5}
nms_threshold: off
tiling: {width: 400, height: 400}
class_suffix: _auto
"""
IN_FILE = yaml.safe_load(FILE)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        pytest.param({}, {}, id="the file alone"),
        pytest.param({"threshold": 0.0}, {"conf": 0.0}, id="a threshold of 0"),
        pytest.param({"prompt": "car"}, {"text_prompt": "car"}, id="another spelling of its key"),
        pytest.param({"nms": "0.3"}, {"nms_threshold": 0.3}, id="NMS"),
        pytest.param({"tiling": "off"}, {"tiling": None}, id="tiling off"),
        pytest.param(
            {"class_thresholds": ["dog=0.1"]}, {"class_thresholds": {"dog": 0.1}},
            id="thresholds of classes take the place of the file's",
        ),
        pytest.param(
            {"classes": ["pet=hamster"]}, {"mapping": {"pet": ["hamster"]}}, id="a class besides",
        ),
        pytest.param({"num_beams": 1}, {"num_beams": 1}, id="beams"),
    ],
)  # fmt: skip
def test_an_option_takes_the_place_of_its_key_in_the_file(file, words, changes):
    assert label_settings(file=file, **words) == parse_settings({**IN_FILE, **changes})


CURVES = {"dog": [[0.2, 0.1], [0.7, 0.9]], "Cat": [[0.0, 0.5]]}
TUNED = {
    "task_prompt": "<CAPTION_TO_PHRASE_GROUNDING>",
    "mapping": {"dog": ["puppy"], "Cat": ["cat"]},
    "class_thresholds": {"dog": 0.8, "Cat": 0.6},
    "calibration": CURVES,
}


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ({"threshold": 0.1}, {"dog", "Cat"}),
        ({"task": "<CAPTION_TO_PHRASE_GROUNDING>"}, {"dog", "Cat"}),
        ({"classes": ["other=fox"]}, set()),
        ({"classes": ["other=fox", "DOG=puppy"]}, {"dog"}),
        ({"classes": ["dog=hound", "Cat"]}, set()),
        ({"classes": ["dog=hound", "Cat=cat"]}, {"Cat"}),
        ({"task": "<OPEN_VOCABULARY_DETECTION>"}, set()),
    ],
)
def test_a_calibration_is_not_used_for_another_question_than_it_was_measured_with(
    tmp_path, capsys, words, kept
):
    path = tmp_path / "tuned.yaml"
    path.write_text(yaml.safe_dump(TUNED))
    settings = label_settings(file=path, **words)
    assert set(settings.calibration) == set(settings.class_thresholds) == kept
    said = capsys.readouterr().err
    assert all(name in said for name in CURVES.keys() - kept)
    assert bool(said) is (kept != CURVES.keys())


def test_a_calibration_without_prompts_beside_it_is_for_the_classes_that_are_asked(tmp_path):
    path = tmp_path / "tuned.yaml"
    path.write_text(yaml.safe_dump({"calibration": {"dog": CURVES["dog"]}}))
    assert set(label_settings(file=path, classes=["dog=hound"]).calibration) == {"dog"}
    with pytest.raises(RequestError, match="'dog' is none of"):
        label_settings(file=path, classes=["fox"])


def test_what_is_looked_for_takes_the_place_of_a_reference(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("reference_bbox: [1, 2, 30, 40]\n")
    assert label_settings(file=path).reference.box_xyxy == (2, 1, 41, 31)
    assert label_settings(file=path, prompt="dog") == label_settings(prompt="dog")


def test_no_suffix_comes_from_the_form_of_a_file(tmp_path):
    """The same three keys in a request are those of an application that takes one off again."""
    path = tmp_path / "settings.yaml"
    path.write_text("mapping: {dog: puppy}\nmode: text_prompt\ntext: cat\n")
    assert label_settings(file=path).class_suffix == ""


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        pytest.param(b"conf: [", "cannot be read (ParserError)", id="no YAML"),
        pytest.param(b"\xff\xfe", "cannot be read (UnicodeDecodeError)", id="no text"),
        pytest.param(None, "cannot be read (No such file or directory)", id="no file"),
        pytest.param(b"- 1\n", "a key and a value on each line", id="a list"),
        pytest.param(b"confidense: 0.2", "did you mean 'confidence'?", id="unknown key"),
        pytest.param(b"conf: 3", "conf is a number from 0 to 1", id="wrong value"),
        pytest.param(
            b"{mode: reference_image, reference_image_id: 7, reference_bbox: [1, 2, 30, 40]}",
            "Images of the platform are not looked at here", id="an image of the platform",
        ),
    ],
)  # fmt: skip
def test_a_wrong_settings_file_gets_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "settings.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RequestError, match=r".") as error:
        label_settings(file=path)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("entry", ["dog", "=0.5", "dog="])
def test_a_wrong_threshold_of_a_class_gets_one_sentence(entry):
    with pytest.raises(RequestError, match=r"is written NAME=0\.6"):
        label_settings(class_thresholds=[entry])


def test_a_journal_notes_what_earlier_versions_lack_only_where_it_was_asked_for():
    plain = journal_settings(label_settings(prompt="dog", threshold=0.3), "demo")
    assert list(plain) == [
        "task", "prompts", "classes", "region", "threshold", "model", "num_beams", "max_new_tokens",
    ]  # fmt: skip
    more = journal_settings(label_settings(prompt="dog", threshold=0.3, nms="0.5"), "demo")
    assert more == {**plain, "nms_threshold": 0.5}
    json.dumps(journal_settings(label_settings(tiling="512", geometry="bitmap"), "demo"))
