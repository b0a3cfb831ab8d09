"""Reading typed fields of a ``config.json``, with errors that name the field."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from florence2.errors import CheckpointError

Value = TypeVar("Value")


def sub_section(config: Mapping[str, Any], name: str, prefix: str = "") -> Mapping[str, Any]:
    """The mapping under ``name``."""
    value = config.get(name)
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"config.json must have the section {prefix}{name}, got {value!r}; "
            "this is not a Florence-2 checkpoint or its config.json is incomplete."
        )
    return value


def get_field(
    section: Mapping[str, Any],
    where: str,
    name: str,
    read: Callable[[object], Value],
    default: Value | None = None,
) -> Value:
    """``section[name]`` through ``read``; without a default a missing field is an error."""
    if section.get(name) is None:
        if default is not None:
            return default
        raise CheckpointError(
            f"config.json must give {where}.{name}, which is missing; "
            "take config.json from the checkpoint's source."
        )
    try:
        return read(section[name])
    except TypeError:
        raise CheckpointError(
            f"config.json's {where}.{name} has an unusable value, {section[name]!r}; "
            "take config.json from the checkpoint's source."
        ) from None


def check_fixed(section: Mapping[str, Any], where: str, name: str, expected: object) -> None:
    """Raises unless ``section[name]`` is absent or has the one supported value."""
    received = section.get(name, expected)
    if received != expected:
        raise CheckpointError(
            f"config.json's {where} must be {expected!r}, got {received!r}; "
            "this variant of the network is not supported."
        )


def integer(value: object) -> int:
    """A number that counts something."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError
    return value


def number(value: object) -> float:
    """Any number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError
    return float(value)


def flag(value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise TypeError
    return value


def string(value: object) -> str:
    """A text."""
    if not isinstance(value, str):
        raise TypeError
    return value


def integers(value: object) -> tuple[int, ...]:
    """A list of counts."""
    if not isinstance(value, (list, tuple)):
        raise TypeError
    return tuple(integer(item) for item in value)


def flags(value: object) -> tuple[bool, ...]:
    """A list of true or false."""
    if not isinstance(value, (list, tuple)):
        raise TypeError
    return tuple(flag(item) for item in value)
