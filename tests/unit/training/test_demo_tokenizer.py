"""The tokenizer: published layout, loads in transformers, spells any text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from florence2.benchmark.tokenizer_training import build_tokenizer
from florence2.tasks import TASKS
from florence2.tokens import ADDED_TOKENS, IMAGE, MASK
from florence2_demo.checkpoint import tokenizer_texts
from florence2_demo.lexicon import COLOURS, KINDS, SIGN_WORDS

BASE_SIZE = 900


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(path, tokenizer_texts(300), BASE_SIZE)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def test_ids_are_laid_out_as_published(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert tokenizer.convert_tokens_to_ids(MASK) == BASE_SIZE - 1
    first = BASE_SIZE
    expected = list(range(first, first + len(ADDED_TOKENS) + 1))
    assert tokenizer.convert_tokens_to_ids([*ADDED_TOKENS, IMAGE]) == expected
    assert len(tokenizer) == expected[-1] + 1
    assert tokenizer.image_token_id == expected[-1]


def test_files_agree_with_each_other(folder):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert model["vocab"] == vocabulary
    merges = (folder / "merges.txt").read_text().splitlines()[1:]
    assert merges == [" ".join(pair) for pair in model["merges"]]
    assert json.loads((folder / "added_tokens.json").read_text())["<loc_0>"] == BASE_SIZE + 4


def test_frequent_words_are_single_tokens(tokenizer):
    for word in (*KINDS, *COLOURS, *SIGN_WORDS):
        assert len(plain(tokenizer, word)) == 1, word
        assert len(plain(tokenizer, f" {word}")) == 1, word
    for task in TASKS:
        sentence = task.sentence.split("{input}")[0].rstrip()
        assert len(plain(tokenizer, sentence)) <= len(sentence.split()) + 2


@given(text=st.text(max_size=60))
def test_any_text_comes_back(tokenizer, text):
    reserved = ("<s>", "</s>", "<pad>", "<unk>", "<mask>", IMAGE, *ADDED_TOKENS)
    if not any(token in text for token in reserved):
        assert tokenizer.decode(plain(tokenizer, text)) == text


def test_answers_are_spelled_with_one_token_per_location(tokenizer):
    answer = "red car<loc_1><loc_2><loc_30><loc_999>"
    assert len(plain(tokenizer, answer)) == 6
    assert tokenizer.decode(plain(tokenizer, answer)) == answer


def test_building_twice_gives_the_same_file(folder, tmp_path):
    build_tokenizer(tmp_path, tokenizer_texts(300), BASE_SIZE)
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_too_few_words_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="smaller vocabulary"):
        build_tokenizer(tmp_path, ["one two"], 5000)


def test_reference_processor_makes_prompts_with_it(tokenizer):
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    image_processor = transformers.CLIPImageProcessor(
        size={"height": 192, "width": 192}, do_center_crop=False
    )
    image_processor.image_seq_length = 145
    processor = transformers.Florence2Processor(
        image_processor=image_processor, tokenizer=tokenizer
    )
    inputs = processor(images=Image.new("RGB", (40, 30)), text="<OD>", return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    assert ids[:145] == [tokenizer.image_token_id] * 145
    assert tokenizer.decode(ids[145:]) == f"<s>{TASKS[3].sentence}</s>"
