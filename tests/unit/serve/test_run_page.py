"""The page about a run: the verdict, what to review, what is drawn, and how large it can get."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from html_pages import EVIL, Tags
from PIL import Image

from serve.provenance import Manifest
from serve.run_page.drawing import draw_label, scores_of
from serve.run_page.figures import MAX_CLASSES, NUM_DRAWN, ImageOutcome, LowLabel, RunFigures
from serve.run_page.page import RunPage, render, verdict
from serve.sdk import sly

MANIFEST = Manifest(
    run="3f9a01bc",
    model={"name": "Florence-2-large", "revision": "main"},
    task="<OD>",
    prompts=[],
    settings={"threshold": 0.2, "empty": None},
    run_tag=None,
    started="2026-01-01T22:00:00Z",
)


def labeled(name="a.jpg", *scores, **more):
    return ImageOutcome(name, "labeled", name, {"car": list(scores or (0.9,))}, **more)


def failed(name="b.jpg", code="bad_image", message="It is cut."):
    return ImageOutcome(name, "failed", name, code=code, message=message)


def figures_of(*outcomes, draw=None):
    figures = RunFigures()
    for outcome in outcomes:
        figures.add(outcome, draw)
    return figures


def page_of(*outcomes, figures=None, **more):
    given = {"num_pending": 0, "num_images": 5, "seconds": 2.0, "href_of": lambda image: image.key}
    figures = figures or figures_of(*outcomes)
    return RunPage("Labels of photos", MANIFEST, figures, **given | more)


def text_of(page):
    tags = Tags(render(page))
    tags.check()
    return "\n".join(tags.text)


def test_sentences_about_failures_may_be_of_any_length():
    many = [failed(f"{n}.jpg", f"code{n % 50}", "x" * 50_000) for n in range(250)]
    assert len(render(page_of(*many))) < 300_000


EMPTY = ImageOutcome("c.jpg", "empty")
SKIPPED = ImageOutcome("d.jpg", "skipped")


@pytest.mark.parametrize(
    ("outcomes", "more", "says", "tone"),
    [
        ([labeled()] * 1200, {}, "All 1,200 images are labeled.", "good"),
        ([labeled(), EMPTY], {}, "All 2 images are done: 1 labeled, 1 with nothing found.", "good"),
        ([labeled(), SKIPPED], {}, "All 2 images are done: 1 labeled, 1 skipped", "good"),
        ([labeled(), failed()], {}, "1 of 2 images failed; all others are done.", "warning"),
        ([failed()] * 3, {}, "All 3 images failed.", "bad"),
        ([EMPTY] * 3, {}, "All 3 images are done, and nothing was found.", "warning"),
        ([], {}, "There were no images to label.", "warning"),
        ([labeled()], {"error": "The disk is full."}, "is done, but: The disk is full.", "warning"),
        (
            [labeled(), failed()],
            {"error": "Too many failed.", "num_pending": 48},
            "Stopped early after 2 of 50 images, 1 of them failed: Too many failed.",
            "bad",
        ),
        (
            [labeled()],
            {"is_interrupted": True, "num_pending": 3},
            "Stopped by somebody after 1 of 4 images; 3 are still to do.",
            "warning",
        ),
        ([labeled()], {"num_pending": 3}, "Ended after 1 of 4 images; 3 are still", "warning"),
        ([labeled()], {"images": "frames"}, "The only frame is labeled.", "good"),
    ],
)  # fmt: skip
def test_the_verdict_says_in_one_sentence_how_it_went(outcomes, more, says, tone):
    page = page_of(*outcomes, **more)
    said, how = verdict(page)
    assert says in said
    assert how == tone
    assert says in text_of(page)


def test_commands_are_there_as_long_as_there_is_something_to_do_with_them():
    commands = {
        "resume_command": "florence2 label a",
        "undo_commands": ["florence2 undo out --run 3f9a01bc"],
    }
    text = text_of(page_of(labeled(), num_pending=3, retry_command="florence2 retry", **commands))
    assert "florence2 label a" in text
    assert "florence2 retry" in text
    assert "florence2 undo out --run 3f9a01bc" in text
    assert "florence2 label a" not in text_of(page_of(labeled(), **commands))


def test_time_and_rate_and_model_and_settings_are_told():
    text = text_of(page_of(labeled(), num_images=36_000, seconds=26_000.0))
    assert "36,000 images in 7 h 13 min, 1.38 images per second" in text
    for told in ("3f9a01bc", "Florence-2-large, revision main", "<OD>", "threshold", "0.2"):
        assert told in text
    assert "empty" not in text


def test_failures_are_counted_by_reason_and_some_are_named_with_links():
    outcomes = [failed(f"{number}.jpg", "bad_image") for number in range(40)]
    outcomes += [failed(f"x{number}.jpg", "too_slow", "It took too long.") for number in range(2)]
    tags = Tags(render(page_of(labeled(), *outcomes)))
    text = "\n".join(tags.text)
    assert text.index("bad_image") < text.index("too_slow")
    assert "It took too long." in text
    links = tags.values("href")
    assert len([link for link in links if not link.startswith("x")]) < 15
    assert {"x0.jpg", "x1.jpg"} <= set(links)


def test_reasons_are_as_many_as_they_may_be():
    outcomes = [failed(code=f"code {number}") for number in range(5000)]
    figures = figures_of(*outcomes)
    assert sum(one.count for one in figures.failures.values()) == 5000
    assert len(figures.failures) < 100


def test_the_lowest_scored_labels_are_kept_at_most_three_of_one_image():
    rng = random.Random(4)
    outcomes = [labeled(f"{n}.jpg", *(rng.random() for _ in range(9))) for n in range(500)]
    lowest = list(figures_of(*outcomes).lowest)
    assert len(lowest) == NUM_DRAWN
    scores = [low.score for low in lowest]
    assert scores == sorted(scores)
    three = [score for one in outcomes for score in sorted(one.scores["car"])[:3]]
    assert scores == sorted(three)[:NUM_DRAWN]
    for low in lowest:
        assert low.image.scores["car"][low.index] == low.score


def test_only_labels_that_are_among_the_lowest_are_drawn():
    drawn = []
    rng = random.Random(4)
    outcomes = [labeled(f"{n}.jpg", rng.random()) for n in range(5000)]
    figures = figures_of(*outcomes, draw=drawn.append)
    assert set(map(id, figures.lowest)) <= set(map(id, drawn))
    assert len(drawn) < 300
    assert not figures.wants_picture({"car": [0.9]})
    assert figures.wants_picture({"car": [0.9, 0.0]})


def test_scores_have_a_histogram_and_a_median_by_class():
    figures = figures_of(labeled("a", 0.0, 0.1, 0.999), labeled("b", 1.0, 1.0, None))
    car = figures.classes["car"]
    assert (car.num_labels, car.num_images, car.num_scored) == (6, 2, 5)
    assert car.median() == 0.999
    assert car.histogram(10) == [1, 1, 0, 0, 0, 0, 0, 0, 0, 3]
    assert figures.num_low == 2


@pytest.mark.parametrize("scores", [{"text": [None, None]}, {}])
def test_labels_without_scores_and_texts_are_said_to_have_none(scores):
    outcomes = [
        ImageOutcome(f"{number}.jpg", "labeled", scores=scores, num_texts=1) for number in range(40)
    ]
    page = page_of(*outcomes)
    lowest = list(page.figures.lowest)
    assert len(lowest) == NUM_DRAWN
    assert {low.class_name for low in lowest} == {"text" if scores else None}
    text = text_of(page)
    assert "has no scores" in text
    assert "lowest-scored" not in text
    assert ("These labels have no scores." in text) == bool(scores)


def test_labels_with_a_score_come_before_those_without():
    figures = figures_of(*[labeled(f"{n}", None) for n in range(100)], labeled("x", 0.99))
    assert [low.score for low in figures.lowest][:2] == [0.99, None]


def test_what_to_review_names_what_stands_out():
    usual = [labeled(f"{number}.jpg", *[0.9] * (1 + number % 3)) for number in range(100)]
    many = labeled("crowd.jpg", *[0.9] * 60)
    cut = labeled("cut.jpg", is_truncated=True)
    noted = labeled("noted.jpg", notes=["dropped boxes: 3"])
    text = text_of(page_of(*usual, many, cut, noted, EMPTY))
    for told in (
        "1 image with unusually many labels", "60 labels", "crowd.jpg", "1 image with answers cut",
        "cut.jpg", "Dropped boxes.", "noted.jpg", "1 image with nothing found", "c.jpg",
    ):  # fmt: skip
        assert told in text
    usual_text = text_of(page_of(*usual, *[EMPTY] * 20))
    assert "Nothing stands out." in usual_text
    assert "crowd.jpg" not in usual_text


def test_examples_are_by_lot_and_not_the_first():
    names = [
        one.name for one in figures_of(*[ImageOutcome(str(n), "empty") for n in range(999)]).empty
    ]
    assert len(names) == 12
    assert max(map(int, names)) > 500


def test_names_messages_and_settings_of_others_are_text():
    manifest = Manifest(EVIL, {EVIL: EVIL}, EVIL, [EVIL], {EVIL: [EVIL]}, None, EVIL)
    evil = ImageOutcome(
        EVIL, "labeled", EVIL, {EVIL: [0.1]}, is_truncated=True, notes=[EVIL]
    )  # fmt: skip
    figures = figures_of(evil, failed(EVIL, EVIL, EVIL))
    page = RunPage(
        EVIL, manifest, figures, 1, 1, 1.0, lambda image: EVIL, error=EVIL, resume_command=EVIL,
        retry_command=EVIL, advice=[EVIL], undo_commands=[EVIL], remarks=[EVIL],
    )  # fmt: skip
    tags = Tags(render(page))
    tags.check()
    assert "".join(tags.text).count("<script") > 15


def test_a_page_is_small_whatever_the_run_was():
    rng = random.Random(1)
    noise = Image.effect_noise((900, 700), 200).convert("RGB")
    annotation = sly.Annotation((700, 900), [box_label(0.5)])

    def draw(low):
        draw_label(noise, annotation, LowLabel(low.image, "car", 0, 0.5))
        low.jpeg = drawn_box(noise)

    figures = RunFigures()
    for number in range(400):
        scores = {f"class {rng.random()} " + "x" * 300: [rng.random()] for _ in range(3)}
        figures.add(
            ImageOutcome("n" * 400, "labeled", "k", scores, notes=["m" * 400 + str(number)]), draw
        )
        figures.add(failed("n" * 400, f"{'c' * 100}{number}", "m" * 500))
    assert len(figures.classes) == MAX_CLASSES
    assert figures.num_labels == 1200
    rendered = render(page_of(figures=figures, remarks=["r" * 5000] * 500))
    assert rendered.count("data:image/jpeg") == NUM_DRAWN
    assert len(rendered) < 3_000_000
    assert "further classes" in rendered


def box_label(score, box=(20, 10, 60, 90), name="car"):
    tags = [] if score is None else [sly.Tag(sly.TagMeta("confidence", "any_number"), score)]
    return sly.Label(sly.Rectangle(*box), sly.ObjClass(name, sly.Rectangle, [255, 0, 0]), tags)


def drawn_box(picture, score=0.5, annotation=None):
    height, width = picture.size[::-1]
    annotation = annotation or sly.Annotation((height, width), [box_label(score)])
    low = LowLabel(ImageOutcome("a", "labeled"), "car", 0, score)
    draw_label(picture, annotation, low)
    return low.jpeg


def mask_label():
    shape = sly.Bitmap(np.ones((40, 80), dtype=bool), sly.PointLocation(20, 10))
    return sly.Label(shape, sly.ObjClass("car", sly.Bitmap, [255, 0, 0]))


def polygon_label():
    points = [sly.PointLocation(*point) for point in ((20, 10), (20, 90), (60, 90))]
    return sly.Label(sly.Polygon(points), sly.ObjClass("car", sly.Polygon, [255, 0, 0]))


@pytest.mark.parametrize("label", [box_label(None), mask_label(), polygon_label()])
def test_a_drawing_shows_the_label_and_what_is_around_it(label):
    picture = Image.new("RGB", (800, 600), (0, 128, 0))
    jpeg = drawn_box(picture, None, sly.Annotation((600, 800), [label]))
    drawn = Image.open(io.BytesIO(jpeg)).convert("RGB")
    assert max(drawn.size) == 320
    colors = [drawn.getpixel((x, y)) for x in range(drawn.width) for y in range(drawn.height)]
    red = sum(r > 150 and g < 90 for r, g, b in colors)
    green = sum(r < 60 and g > 90 for r, g, b in colors)
    assert red > 200, "its outline"
    assert green > len(colors) / 2


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (4000, 2)])
def test_images_of_any_shape_are_drawn(size):
    annotation = sly.Annotation(size[::-1], [box_label(0.5, (0, 0, size[1] - 1, size[0] - 1))])
    assert drawn_box(Image.new("RGB", size), 0.5, annotation) is not None


def test_boxes_anywhere_on_images_of_odd_sizes_are_drawn():
    rng = random.Random(6)
    for _ in range(150):
        width, height = rng.randint(1, 777), rng.randint(1, 777)
        top, left = rng.randrange(height), rng.randrange(width)
        box = (top, left, rng.randrange(top, height), rng.randrange(left, width))
        annotation = sly.Annotation((height, width), [box_label(0.5, box)])
        # The annotation may be of another size than the file, which turned meanwhile.
        picture = Image.new("RGB", (rng.randint(1, 300), rng.randint(1, 300)))
        assert drawn_box(picture, 0.5, annotation) is not None


def test_a_label_that_is_not_there_any_more_is_not_drawn():
    picture = Image.new("RGB", (100, 100))
    assert drawn_box(picture, 0.5, sly.Annotation((100, 100), [])) is None
    assert drawn_box(picture, 0.5, sly.Annotation((100, 100), [box_label(0.7)])) is None
    assert drawn_box(picture, 0.5, sly.Annotation((100, 100), [box_label(None)])) is None


def test_a_label_is_found_where_others_have_come_or_gone():
    picture = Image.new("RGB", (100, 100))
    others = [box_label(0.7), box_label(0.5)]
    assert drawn_box(picture, 0.5, sly.Annotation((100, 100), others)) is not None


def test_the_score_is_found_under_another_name_too():
    tags = [sly.Tag(sly.TagMeta("confidence_nn", "any_number"), 0.25)]
    label = box_label(None).clone(tags=tags)
    annotation = sly.Annotation((100, 100), [label, box_label(None, name="dog")])
    assert scores_of(annotation) == {"car": [0.25], "dog": [None]}
