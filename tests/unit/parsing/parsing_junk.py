"""Pieces made by hand, and any sequence of them."""

from hypothesis import strategies as st

from florence2.tokenizer import MARKERS, Piece, PieceKind
from florence2.tokens import location_token


def text_piece(data, log_prob=None):
    return Piece(PieceKind.TEXT, data, None, log_prob, log_prob)


def location(location_bin, log_prob=None):
    spelled = location_token(location_bin).encode()
    return Piece(PieceKind.LOCATION, spelled, location_bin, log_prob, log_prob)


def marker(token, log_prob=None):
    return Piece(PieceKind.MARKER, token.encode(), None, log_prob, log_prob)


def pieces_of(*items):
    """A text or a location bin, each with its log-probability."""
    return [
        location(what, log_prob) if isinstance(what, int) else text_piece(what.encode(), log_prob)
        for what, log_prob in items
    ]


LOG_PROBS = st.floats(max_value=0.0) | st.just(float("nan"))
JUNK_PIECES = st.lists(
    st.one_of(
        st.builds(text_piece, st.binary(max_size=4), LOG_PROBS),
        st.builds(text_piece, st.sampled_from([b"car", b" ", b"the image", b"\n"]), LOG_PROBS),
        st.builds(location, st.integers(0, 999), LOG_PROBS),
        st.builds(location, st.integers(0, 2), LOG_PROBS),
        st.builds(marker, st.sampled_from(["<poly>", "</poly>", "<sep>"]), LOG_PROBS),
        st.builds(marker, st.sampled_from(MARKERS), LOG_PROBS),
    ),
    max_size=60,
)
JUNK_TEXT = st.lists(
    st.one_of(
        st.text(max_size=5),
        st.sampled_from(["<loc_", ">", "<", "</s>", "<s>", "<pad>", "<poly>", "</poly>", "<sep>"]),
        st.integers(0, 1200).map("<loc_{}>".format),
        st.sampled_from(["<loc_99999999999>", "<loc_٣>", "<loc_-1>", "<loc_1.5>", "\ud800"]),
    ),
    max_size=40,
).map("".join)
