"""The one sentence about a wrong setting: its key, the rule, what was received, what to write."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable

from pydantic import ValidationError


class RuleError(ValueError):
    """A value breaks a rule.

    Its sentence has the key between ``before`` and ``after``, because a validator does not know
    which of the key's spellings a client sent.
    """

    def __init__(self, after: str, before: str = "") -> None:
        super().__init__(before + after)
        self.before, self.after = before, after


def refused(rule: str, value: object, example: str, before: str = "") -> RuleError:
    """The rule, the value received, what to write."""
    after = f" is {rule}, and {shown(value)} was received; write for example {example}."
    return RuleError(after, before)


def check_count(count: int, limit: int, what: str, advice: str, before: str = "") -> None:
    """RuleError when there are more than ``limit``."""
    if count > limit:
        after = f" has at most {limit} {what}, and {count} were received; {advice}."
        raise RuleError(after, before)


def shown(value: object) -> str:
    """A received value in one short line, for a message."""
    try:
        text = " ".join(reprlib.repr(value).split())
    except ValueError:  # an integer with thousands of digits
        return "a very long number"
    return text if len(text) <= 80 else text[:77] + "..."


def hint(received: object, known: Iterable[str]) -> str:
    """A name that is in no list, and the nearest one that is."""
    choices = list(known)
    name = received[:100] if isinstance(received, str) else shown(received)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    advice = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(choices)}."
    return f"{shown(received)}; {advice}"


def sentence(key: str, received: object, error: ValidationError) -> str:
    """pydantic's first error about what was received under ``key``, in one sentence."""
    first = error.errors(include_url=False)[0]
    path = ".".join([key, *(part for part in first["loc"] if isinstance(part, str))])
    if first["type"] == "literal_error":
        known = re.findall(r"'(\w+)'", first["ctx"]["expected"])
        return f"Unknown {path} {hint(received, known)}"
    reason = first["ctx"]["error"]
    return f"{reason.before}{path}{reason.after}"
