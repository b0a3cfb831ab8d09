"""What kind of thing was received, in the words of people who do not program."""

from __future__ import annotations


def kind_of(value: object) -> str:
    """The kind of a JSON value: ``"a list"``, ``"text"``, ``"nothing"``."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    if value is None:
        return "nothing"
    return names.get(type(value), "a number")
