"""Text to token ids and back, and the alphabet of an answer: text, location bins and markers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from florence2.errors import CheckpointError, RequestError
from florence2.records import AnswerToken, TokenKind
from florence2.tokens import (
    ADDED_TOKENS,
    BOS,
    BOS_ID,
    EOS,
    EOS_ID,
    IMAGE,
    MASK,
    NUM_LOCATION_BINS,
    PAD,
    PAD_ID,
    UNK,
    location_token,
)

DROPPED_TOKENS: Final = (BOS, EOS, PAD)
MARKERS: Final = (
    *(token for token in ADDED_TOKENS if not token.startswith("<loc_")),
    UNK,
    MASK,
    IMAGE,
)

# No token has a character with a meaning in a pattern.
_DROPPED_PATTERN: Final = re.compile("|".join(DROPPED_TOKENS))
_TOKEN_PATTERN: Final = re.compile(r"<loc_(?P<bin>[0-9]{1,6})>|" + "|".join(MARKERS))
_CONTROL_PATTERN: Final = re.compile("|".join((BOS, PAD, EOS, UNK, MASK, IMAGE)))


def strip_dropped(text: str) -> str:
    """A raw generated string without ``<s>``, ``</s>`` and ``<pad>``."""
    return _DROPPED_PATTERN.sub("", text)


def tokens_from_text(text: str) -> tuple[AnswerToken, ...]:
    """The tokens of a raw generated string, without probabilities.

    ``<loc_1000>``, which some fine-tunes were trained on, counts as the last bin.
    """
    tokens: list[AnswerToken] = []
    text = strip_dropped(text)
    end = 0
    for match in _TOKEN_PATTERN.finditer(text):
        tokens += _text_token(text[end : match.start()])
        if match["bin"] is None:
            tokens.append(AnswerToken(TokenKind.MARKER, match.group().encode()))
        else:
            location_bin = min(int(match["bin"]), NUM_LOCATION_BINS - 1)
            tokens.append(AnswerToken(TokenKind.LOCATION, match.group().encode(), location_bin))
        end = match.end()
    tokens += _text_token(text[end:])
    return tuple(tokens)


def _text_token(text: str) -> list[AnswerToken]:
    return [AnswerToken(TokenKind.TEXT, text.encode(errors="replace"))] if text else []


def joined_text(tokens: Iterable[AnswerToken]) -> str:
    """What the tokens spell together; bytes that are no UTF-8 become U+FFFD."""
    return b"".join(token.data for token in tokens).decode(errors="replace")


class Vocabulary:
    """The token ids of one checkpoint. Immutable after construction; safe to share by threads."""

    def __init__(self, tokenizer: Tokenizer, source: str = "the tokenizer") -> None:
        """Take a loaded byte-level tokenizer and add the published tokens it lacks.

        ``source`` is what an error names. Raises CheckpointError if ``<s>``, ``<pad>`` and
        ``</s>`` are not 0, 1 and 2, or the location tokens are not consecutive.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _add_published_tokens(tokenizer)
        ids_by_token: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        _check_ids(ids_by_token, source)
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        self._tokenizer = tokenizer
        self.size: int = max(ids_by_token.values()) + 1
        self.first_location_id: int = ids_by_token[location_token(0)]
        self.image_id: int | None = ids_by_token.get(IMAGE)
        self._bytes_by_id = _spell(ids_by_token, added, self.size)
        self._dropped_ids = frozenset(ids_by_token[token] for token in DROPPED_TOKENS)
        self._marker_ids = frozenset(ids_by_token[t] for t in MARKERS if t in ids_by_token)

    @classmethod
    def from_folder(cls, folder: Path) -> Vocabulary:
        """Read ``tokenizer.json``, or ``vocab.json`` and ``merges.txt`` where it is missing.

        Raises CheckpointError naming the file that is missing, cut or of no known form.
        """
        folder = Path(folder)
        whole = folder / "tokenizer.json"
        tokenizer = _read_whole(whole) if whole.is_file() else _read_parts(folder)
        _add_extra_tokens(tokenizer, folder)
        return cls(tokenizer, str(folder))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it stands: no ``<s>`` in front, no ``</s>`` behind.

        Added tokens such as ``<loc_5>`` are recognised. Text of a caller goes through
        ``florence2.engine.ask.prompt_sentence`` first, which refuses tokens smuggled into it.
        """
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, sentence: str) -> list[int]:
        """The encoder's text ids: ``<s>``, the sentence, ``</s>``; visual tokens go in front.

        Raises RequestError if the sentence spells ``<s>``, ``</s>``, ``<pad>``, ``<unk>``,
        ``<mask>`` or ``<image>``.
        """
        found = _CONTROL_PATTERN.search(sentence)
        if found is not None:
            raise RequestError(
                f"A prompt must not contain the control token {found.group()}; remove it."
            )
        return [BOS_ID, *self.encode(sentence), EOS_ID]

    def bytes_of(self, token_id: int) -> bytes:
        """The UTF-8 bytes a token spells, possibly part of a character.

        Empty for ids beyond the vocabulary: checkpoints pad their embedding to a round size.
        """
        return self._bytes_by_id[token_id] if 0 <= token_id < self.size else b""

    def location_of(self, token_id: int) -> int | None:
        """The location bin, 0 to 999, that a token stands for, or None."""
        location_bin = token_id - self.first_location_id
        return location_bin if 0 <= location_bin < NUM_LOCATION_BINS else None

    def answer_tokens(
        self,
        token_ids: Sequence[int],
        log_probs: Sequence[float] | None = None,
        near_log_probs: Sequence[float] | None = None,
    ) -> tuple[AnswerToken, ...]:
        """What the parser reads: a token per id, without ``<s>``, ``</s>`` and ``<pad>``.

        ``log_probs`` has one natural logarithm per token id, or is None when unknown; so has
        ``near_log_probs``, which are ``log_probs`` when not given.
        """
        unknown = [None] * len(token_ids)
        exact: Sequence[float | None] = unknown if log_probs is None else log_probs
        near = near_log_probs or exact
        for given in (exact, near):
            if len(given) != len(token_ids):
                raise ValueError(
                    f"One log-probability per token is needed: {len(token_ids)} token ids, "
                    f"{len(given)} log-probabilities."
                )
        return tuple(
            AnswerToken(
                self._kind(token_id), self.bytes_of(token_id), self.location_of(token_id), *p
            )
            for token_id, *p in zip(token_ids, exact, near, strict=True)
            if token_id not in self._dropped_ids
        )

    def answer_text(self, token_ids: Iterable[int]) -> str:
        """The generated string, special tokens spelled out, but for ``<s> </s> <pad>``."""
        kept = (self.bytes_of(i) for i in token_ids if i not in self._dropped_ids)
        return b"".join(kept).decode("utf-8", errors="replace")

    def _kind(self, token_id: int) -> TokenKind:
        if self.location_of(token_id) is not None:
            return TokenKind.LOCATION
        return TokenKind.MARKER if token_id in self._marker_ids else TokenKind.TEXT


def _check_ids(ids_by_token: dict[str, int], source: str) -> None:
    for token, expected in {BOS: BOS_ID, PAD: PAD_ID, EOS: EOS_ID}.items():
        if ids_by_token.get(token) != expected:
            raise CheckpointError(
                f"The tokenizer of {source} must give {token} the id {expected}, but gives "
                f"{ids_by_token.get(token)}; this is not a Florence-2 tokenizer."
            )
    first = ids_by_token[location_token(0)]
    for location_bin in range(NUM_LOCATION_BINS):
        token = location_token(location_bin)
        if ids_by_token[token] != first + location_bin:
            raise CheckpointError(
                f"The location tokens of {source} must have consecutive ids, but {token} has "
                f"{ids_by_token[token]} instead of {first + location_bin}; "
                "download the tokenizer again."
            )


def _spell(ids_by_token: dict[str, int], added: set[str], size: int) -> tuple[bytes, ...]:
    # The character that stands for each byte in a byte-level BPE vocabulary: bytes that are
    # printable Latin-1 stand for themselves, the other 68 are numbered from U+0100.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    byte_of_char = {chr(byte): byte for byte in printable}
    byte_of_char |= {chr(0x100 + position): byte for position, byte in enumerate(others)}
    spelled = [b""] * size
    for token, token_id in ids_by_token.items():
        if token not in added and all(char in byte_of_char for char in token):
            spelled[token_id] = bytes(byte_of_char[char] for char in token)
        else:
            spelled[token_id] = token.encode()
    return tuple(spelled)


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is cut or damaged; download it again.")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"The checkpoint has no {path.name}: {path} is missing; download it again."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download it again.") from error


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except ValueError as error:
        raise _damaged(path) from error
    if not isinstance(content, dict):
        raise _damaged(path)
    return content


def _read_whole(path: Path) -> Tokenizer:
    # Parsed first because the tokenizers package reports damage as a plain Exception.
    content = _read_json_object(path)
    try:
        return Tokenizer.from_str(json.dumps(content))
    except Exception as error:
        raise _damaged(path) from error


def _read_parts(folder: Path) -> Tokenizer:
    vocab_path, merges_path = folder / "vocab.json", folder / "merges.txt"
    if not vocab_path.is_file():
        raise CheckpointError(
            f"{folder} has neither tokenizer.json nor vocab.json; download the checkpoint again."
        )
    vocab = _read_json_object(vocab_path)
    merges: list[tuple[str, str]] = []
    for line in _read_text(merges_path).split("\n"):
        if not line.strip() or line.startswith("#version"):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise _damaged(merges_path)
        merges.append((pair[0], pair[1]))
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:
        raise CheckpointError(
            f"{vocab_path} and {merges_path.name} do not belong together; download both again."
        ) from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [_as_added(token) for token in (BOS, PAD, EOS, UNK) if token in vocab]
    )
    if MASK in vocab:
        tokenizer.add_special_tokens([_as_added(MASK, lstrip=True)])
    return tokenizer


def _as_added(token: str, **flags: bool) -> AddedToken:
    return AddedToken(token, **{"normalized": False, **flags}, special=True)


def _add_published_tokens(tokenizer: Tokenizer) -> None:
    missing = [token for token in ADDED_TOKENS if tokenizer.token_to_id(token) is None]
    tokenizer.add_special_tokens([_as_added(token) for token in missing])


def _add_extra_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """Add the tokens that stand beside the tokenizer, in the order of their ids; insist on those.

    ``added_tokens.json`` has ids by token, ``tokenizer_config.json`` tokens by id.
    """
    for path, tokens_of in (
        (folder / "added_tokens.json", _from_ids_by_token),
        (folder / "tokenizer_config.json", _from_tokenizer_config),
    ):
        if not path.is_file():
            continue
        try:
            tokens = sorted(tokens_of(_read_json_object(path)), key=lambda entry: entry[0])
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise _damaged(path) from error
        for token_id, token in tokens:
            _add_with_id(tokenizer, token, token_id, path)


def _from_ids_by_token(content: dict[str, Any]) -> list[tuple[int, AddedToken]]:
    if not all(type(token_id) is int for token_id in content.values()):
        raise TypeError
    return [(token_id, _as_added(token)) for token, token_id in content.items()]


def _from_tokenizer_config(config: dict[str, Any]) -> list[tuple[int, AddedToken]]:
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    return [
        (
            int(token_id),
            _as_added(entry["content"], **{name: entry.get(name, False) for name in flags}),
        )
        for token_id, entry in (config.get("added_tokens_decoder") or {}).items()
    ]


def _add_with_id(tokenizer: Tokenizer, token: AddedToken, token_id: int, path: Path) -> None:
    if tokenizer.token_to_id(token.content) is None:
        if tokenizer.get_vocab_size(with_added_tokens=True) < token_id:
            # A token of a fine-tune comes after the published ones, which come when loading.
            _add_published_tokens(tokenizer)
        tokenizer.add_special_tokens([token])
    given = tokenizer.token_to_id(token.content)
    if given != token_id:
        raise CheckpointError(
            f"{path} gives {token.content!r} the id {token_id}, but the tokenizer beside it gives "
            f"{given}; the files do not belong together."
        )
