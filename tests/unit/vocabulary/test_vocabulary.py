"""Both published layouts and fine-tunes give the ids the reference gives; damage is named."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from florence2.errors import CheckpointError, RequestError
from florence2.records import TokenKind
from florence2.tokenizer import Vocabulary
from florence2.tokens import ADDED_TOKENS, IMAGE, location_token

TEXTS = [
    "a red car",
    "Locate the objects with category name in the image.",
    "car<loc_0><loc_1><loc_500><loc_999>door<loc_7><loc_8><loc_9><loc_10>",
    "<poly><loc_1><loc_2><sep><loc_3></poly> and <and> more",
    " leading, trailing  and   double spaces ",
    "café naïve 中文 龍が飛ぶ кириллица 👍🏽 \u200d",
    "line one\nline two\ttabbed",
    "a < b <loc_> <loc_1000> <unknown>",
    "",
]


@pytest.fixture(scope="module")
def original(original_folder):
    return Vocabulary.from_folder(original_folder)


@pytest.fixture(scope="module")
def native(native_folder):
    return Vocabulary.from_folder(native_folder)


@pytest.fixture
def folder(original_folder, tmp_path):
    return shutil.copytree(original_folder, tmp_path / "copy")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("layout", ["original", "native"])
def test_ids_and_text_equal_the_reference(layout, text, reference, request):
    vocabulary = request.getfixturevalue(layout)
    ids = vocabulary.encode(text)
    assert ids == reference.tokenizer(text, add_special_tokens=False).input_ids
    assert vocabulary.answer_text(ids) == reference.tokenizer.decode(ids)


def test_published_tokens_follow_the_base_vocabulary(original, native, original_folder):
    base = len(json.loads((original_folder / "vocab.json").read_text(encoding="utf-8")))
    for vocabulary in (original, native):
        ids = [vocabulary.encode(token) for token in ADDED_TOKENS]
        assert ids == [[base + position] for position in range(len(ADDED_TOKENS))]
    assert original.image_id is None
    assert native.image_id == base + len(ADDED_TOKENS)
    assert (original.size, native.size) == (native.image_id, native.image_id + 1)


def test_location_tokens_are_told_by_their_ids(native):
    for location_bin in (0, 1, 500, 999):
        assert native.encode(location_token(location_bin)) == [
            native.first_location_id + location_bin
        ]
        assert native.location_of(native.first_location_id + location_bin) == location_bin
    assert native.location_of(native.first_location_id - 1) is None
    assert native.location_of(native.first_location_id + 1000) is None


def test_a_whole_tokenizer_without_the_published_tokens_gets_them(original, folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    plain = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.enable_truncation(4)
    plain.enable_padding()
    plain.save(str(folder / "tokenizer.json"))
    (folder / "merges.txt").unlink()
    vocabulary = Vocabulary.from_folder(folder)
    text = "a red car<loc_5> parked in front of a yellow building"
    assert vocabulary.encode(text) == original.encode(text)


def by_id(tokens, **flags):
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {
        str(token_id): {"content": token, **plain, "special": True, **flags}
        for token, token_id in tokens.items()
    }


def added_tokens(own, published):
    return "added_tokens.json", published | own


def config_alone(own, published):
    return "tokenizer_config.json", {"added_tokens_decoder": by_id({"<s>": 0, **own})}


def config_with_published(own, published):
    return "tokenizer_config.json", {"added_tokens_decoder": by_id({"<s>": 0, **own, **published})}


@pytest.mark.parametrize("place", [added_tokens, config_alone, config_with_published])
def test_tokens_of_a_fine_tune_keep_their_ids(original, folder, place):
    own = {"<DocVQA>": original.size, "étiquette": original.size + 1}
    published = {token: original.encode(token)[0] for token in ADDED_TOKENS}
    name, content = place(own, published)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    vocabulary = Vocabulary.from_folder(folder)
    assert vocabulary.encode("<DocVQA>étiquette") == list(own.values())
    text = "a red car<loc_5><DocVQA>"
    assert vocabulary.encode(text) == [*original.encode("a red car<loc_5>"), original.size]
    assert vocabulary.answer_text([original.size + 1]) == "étiquette"
    assert vocabulary.answer_tokens([original.size])[0].kind is TokenKind.TEXT
    assert vocabulary.size == original.size + 2


def test_a_saved_tokenizer_with_added_tokens_reads_as_the_reference_reads_it(
    native, native_folder, tmp_path
):
    transformers = pytest.importorskip("transformers")
    folder = shutil.copytree(native_folder, tmp_path / "copy")
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    known = {token.pop("content"): token.pop("id") for token in whole["added_tokens"]}
    decoder = by_id(known | {"<DocVQA>": native.size})
    decoder |= by_id({"word": native.size + 1}, single_word=True, lstrip=True, special=False)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"added_tokens_decoder": decoder}), encoding="utf-8")
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    vocabulary = Vocabulary.from_folder(folder)
    for text in ("<DocVQA>what is it?", "a  word and words<loc_7>", "passwords word"):
        assert vocabulary.encode(text) == reference(text, add_special_tokens=False).input_ids


def test_an_answer_has_a_token_per_id_with_its_log_probability(native):
    ids = [2, 0, *native.encode("car<loc_5></poly>"), 2, 1]
    log_probs = [-float(position) for position in range(len(ids))]
    tokens = native.answer_tokens(ids, log_probs)
    assert b"".join(token.data for token in tokens) == b"car<loc_5></poly>"
    assert [token.kind for token in tokens][-2:] == [TokenKind.LOCATION, TokenKind.MARKER]
    assert [token.location_bin for token in tokens][-2:] == [5, None]
    assert [token.log_prob for token in tokens] == log_probs[2:-2]
    assert [token.near_log_prob for token in tokens] == log_probs[2:-2]
    assert {token.log_prob for token in native.answer_tokens(ids)} == {None}
    for odd in ([[0.0]], [log_probs, [0.0]]):
        with pytest.raises(ValueError, match="One log-probability per token"):
            native.answer_tokens(ids, *odd)


def test_ids_beyond_the_vocabulary_spell_nothing(native):
    for token_id in (native.size, native.size + 50, -1):
        assert native.bytes_of(token_id) == b""
    assert native.answer_text([*native.encode("car"), native.size + 3]) == "car"


@given(text=st.text())
def test_any_text_survives_the_way_there_and_back(native, text):
    ids = native.encode(text)
    assert b"".join(native.bytes_of(token_id) for token_id in ids) == text.encode()


@given(ids=st.lists(st.integers(0, 1800)))
def test_any_ids_spell_what_the_reference_spells(native, reference, ids):
    kept = [i for i in ids if i < native.size and i > 2]
    assert native.answer_text(kept) == reference.tokenizer.decode(kept)


def test_a_prompt_is_framed_and_free_of_control_tokens(native):
    assert native.encode_prompt("a car") == [0, *native.encode("a car"), 2]
    for token in ("<s>", "</s>", "<pad>", "<unk>", "<mask>", IMAGE):
        with pytest.raises(RequestError, match=f"control token {token}"):
            native.encode_prompt(f"a {token} car")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write(name, content):
    """A damage that puts ``content`` in the place of a file."""
    data = content if isinstance(content, str) else json.dumps(content)
    return lambda folder: (folder / name).write_text(data, encoding="utf-8")


def shift_locations(folder):
    base = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    tokens = {token: base + position for position, token in enumerate(ADDED_TOKENS)}
    tokens["<loc_3>"], tokens["<loc_4>"] = tokens["<loc_4>"], tokens["<loc_3>"]
    write("added_tokens.json", tokens)(folder)


OTHER_IDS = {"type": "BPE", "vocab": {"<s>": 2, "<pad>": 1, "</s>": 0}, "merges": []}
DAMAGES = {
    "no merges": (lambda f: (f / "merges.txt").unlink(), "merges.txt is missing"),
    "no vocabulary": (lambda f: (f / "vocab.json").unlink(), "neither tokenizer.json nor vocab"),
    "vocabulary cut": (lambda f: cut(f / "vocab.json"), "vocab.json is cut or damaged"),
    "vocabulary a list": (write("vocab.json", "[]"), "vocab.json is cut"),
    "vocabulary odd": (write("vocab.json", {"a": "b"}), "belong together"),
    "merges odd": (write("merges.txt", "a b c"), "merges.txt is cut"),
    "merges foreign": (write("merges.txt", "蟹 蟹"), "belong together"),
    "not text": (lambda f: (f / "merges.txt").write_bytes(b"\xff\xfe"), "merges.txt cannot be"),
    "empty whole": (write("tokenizer.json", ""), "tokenizer.json is cut"),
    "whole of another kind": (write("tokenizer.json", {}), "is cut"),
    "other ids": (write("tokenizer.json", {"model": OTHER_IDS}), "must give <s> the id 0"),
    "locations shuffled": (shift_locations, "consecutive"),
    "added token elsewhere": (
        write("added_tokens.json", {"<x>": 9000}),
        "do not belong together",
    ),
    "added token elsewhere in the config": (
        write("tokenizer_config.json", {"added_tokens_decoder": by_id({"<x>": 9000})}),
        "do not belong together",
    ),
    "added tokens of the config odd": (
        write("tokenizer_config.json", {"added_tokens_decoder": {"7": "<x>"}}),
        "tokenizer_config.json is cut",
    ),
    "added ids odd": (write("added_tokens.json", {"<x>": "y"}), "is cut"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_one_sentence_naming_the_file(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as raised:
        Vocabulary.from_folder(folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)
