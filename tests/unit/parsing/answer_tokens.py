"""Answer tokens made by hand."""

from florence2.records import AnswerToken, TokenKind
from florence2.tokens import location_token


def text_token(data, log_prob=None):
    return AnswerToken(TokenKind.TEXT, data, None, log_prob, log_prob)


def location(location_bin, log_prob=None):
    spelled = location_token(location_bin).encode()
    return AnswerToken(TokenKind.LOCATION, spelled, location_bin, log_prob, log_prob)


def marker(token, log_prob=None):
    return AnswerToken(TokenKind.MARKER, token.encode(), None, log_prob, log_prob)


def tokens_of(*items):
    """A text or a location bin, each with its log-probability."""
    return [
        location(what, log_prob) if isinstance(what, int) else text_token(what.encode(), log_prob)
        for what, log_prob in items
    ]
