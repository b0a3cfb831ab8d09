from __future__ import annotations

import pytest

from florence2.errors import RequestError
from florence2.records import Region
from serve.labeling.plan import make_plan

GROUNDING = "<CAPTION_TO_PHRASE_GROUNDING>"


def plan(**words):
    return make_plan(model="demo", **words)


def asked(**words):
    made = plan(**words)
    return made.task, [(p.text, p.class_name) for p in made.prompts], list(made.class_names)


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
        plan(**words)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_region_is_read_in_pixels():
    made = plan(task="region_category", region="1, 2.5,30,40")
    assert made.region == Region((1.0, 2.5, 30.0, 40.0))
