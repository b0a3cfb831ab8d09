"""Addresses: which are public, and numbers in any spelling."""

import pytest

from serve.http.url_fetch import is_public, resolve_host


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_a_public_address_is_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        pytest.param("192.0.0.192", id="metadata of a cloud"),
        pytest.param("169.254.169.254", id="metadata of most clouds"),
        pytest.param("::ffff:169.254.169.254", id="the same in IPv6"),
        pytest.param("fd00:ec2::254", id="metadata by IPv6"),
        pytest.param("192.88.99.1", id="a relay"),
        pytest.param("fec0::1", id="site-local"),
        pytest.param("3fff::1", id="documentation"),
        pytest.param("64:ff9b:1::7f00:1", id="a translation of one's own"),
        pytest.param("::127.0.0.1", id="IPv4 as it was once written"),
        pytest.param("::ffff:0:127.0.0.1", id="IPv4 translated"),
        pytest.param("2001:0:7f00:1::", id="Teredo"),
        pytest.param("fe80::1%eth0", id="link-local with its link"),
    ],
)
def test_an_address_with_a_special_meaning_is_not(address):
    assert not is_public(address)


def test_the_resolver_turns_numbers_of_any_spelling_into_addresses():
    assert resolve_host("2130706433", 80) == ["127.0.0.1"]
