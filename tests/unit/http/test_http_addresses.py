"""Addresses: which are public, and numbers in any spelling."""

import pytest

from serve.http.addresses import is_public, resolve_host


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_a_public_address_is_public(address):
    assert is_public(address)


def test_the_resolver_turns_numbers_of_any_spelling_into_addresses():
    assert resolve_host("2130706433", 80) == ["127.0.0.1"]
