"""Errors of the way to the platform, as a person reads them."""

import ssl

import httpx
import pytest
import requests

from florence2.errors import RequestError
from serve.http.errors import status_of
from serve.platform.failures import failure_of, platform_failure
from serve.sdk import sly

# isort: split
from supervisely.io.network_exceptions import RetryableRequestException, process_unhandled_request


def answered(status):
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"{status} Client Error: Odd for url: http://x", response=response)


def sdk_error():
    """What the SDK makes of an error of its transport that it does not know."""
    try:
        process_unhandled_request(sly.logger, ValueError("odd"))
    except RuntimeError as error:
        return error


REQUEST = httpx.Request("POST", "http://x")
ERRORS = {
    "refused, or no such host": (requests.ConnectionError("x"), "cannot be reached"),
    "no answer": (requests.ReadTimeout("x"), "did not answer in time"),
    "no connection in time": (requests.ConnectTimeout("x"), "did not answer in time"),
    "a certificate": (requests.exceptions.SSLError(ssl.SSLError("x")), "certificate"),
    "a proxy": (requests.exceptions.ProxyError("x"), "proxy"),
    "reset in the middle": (requests.exceptions.ChunkedEncodingError("x"), "broke off"),
    "reset, by the other client": (httpx.ReadError("x"), "broke off"),
    "refused, by the other client": (httpx.ConnectError("x"), "cannot be reached"),
    "no answer, by the other client": (httpx.ReadTimeout("x"), "did not answer in time"),
    "retried in vain": (requests.exceptions.RetryError("x"), "however often"),
    "a page where JSON should be": (requests.exceptions.JSONDecodeError("x", "<p>", 0), "no JSON"),
    "a proxy's status": (answered(502), "status 502"),
    "the same, by the other client": (
        httpx.HTTPStatusError("x", request=REQUEST, response=httpx.Response(503)),
        "status 503",
    ),
    "rights": (answered(403), "rights"),
    "the SDK's own": (RetryableRequestException("x"), "RetryableRequestException"),
    "the SDK's for all the rest": (sdk_error(), "RuntimeError"),
}


@pytest.mark.parametrize(("error", "says"), ERRORS.values(), ids=ERRORS)
def test_a_failure_of_the_platform_is_said_to_be_one(error, says):
    failure = platform_failure(error)
    assert failure is not None
    assert status_of(failure.code) == 424
    assert says in failure.message
    assert failure.message.endswith(".")


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("x"), ConnectionError("x"), RequestError("x")], ids=repr
)
def test_what_is_not_of_the_platform_stays_what_it_is(error):
    assert platform_failure(error) is None


def test_what_the_platform_said_about_one_image_is_kept():
    failure = failure_of(answered(400), "Image 5 cannot be downloaded", "download_failed")
    assert failure.code == "download_failed"
    assert failure.message.startswith("Image 5 cannot be downloaded")
    assert "400 Client Error: Odd" in failure.message
