"""No log line shows a whole address, whichever library writes it."""

from __future__ import annotations

import io
import json
import logging
import re
import string
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from producer import logs, masking
from producer.setting_types import mask_url

PERSON = "anna.secret@example.com"
MASKED = "a***@example.com"
UNICODE_PERSON = "你好世界@example.com"


class Recipient:
    def __repr__(self) -> str:
        return f"Recipient({PERSON})"


class _Stderr(io.StringIO):
    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture(params=[False, True], ids=["json", "terminal"])
def stderr(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Stderr]:
    """Logging at DEBUG as our processes configure it; restored afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    captured = _Stderr(terminal=request.param)
    monkeypatch.setattr(sys, "stderr", captured)
    logs.configure(logging.DEBUG)
    yield captured
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture
def stdlib() -> logging.Logger:
    """Some library's logger."""
    return logging.getLogger("some.library")


def _is_masked(stderr: _Stderr) -> None:
    text = stderr.getvalue()
    assert text
    assert "secret" not in text
    assert MASKED in text


@pytest.mark.parametrize(
    "words", [(f"mail to <{PERSON}> goes out",), ("%s and %r", PERSON, {"email": [PERSON]}), ("%s", Recipient())]
)
def test_an_address_in_a_message_or_its_arguments_is_masked(
    stderr: _Stderr, stdlib: logging.Logger, words: tuple[Any, ...]
) -> None:
    stdlib.debug(*words)
    _is_masked(stderr)


def test_an_address_in_an_exception_is_masked(stderr: _Stderr, stdlib: logging.Logger) -> None:
    try:
        int(f"550 {PERSON} unknown")
    except ValueError:
        stdlib.exception("refused")
    _is_masked(stderr)
    assert "ValueError" in stderr.getvalue()


def test_an_address_in_a_chained_exception_is_masked(stderr: _Stderr) -> None:
    try:
        try:
            dict[str, str]()[PERSON]
        except KeyError as exc:
            raise ValueError("refused") from exc
    except ValueError:
        structlog.get_logger().exception("refused")
    _is_masked(stderr)


def test_the_local_variables_of_a_traceback_are_not_shown(stderr: _Stderr) -> None:
    code = "".join(["48", "15", "16"])
    try:
        int(code[:0])
    except ValueError:
        structlog.get_logger().exception("refused")
    assert code not in stderr.getvalue()


@pytest.mark.parametrize("value", [PERSON, {"to": [PERSON]}, PERSON.encode(), Recipient()])
def test_an_address_in_an_event_and_its_fields_is_masked(stderr: _Stderr, value: object) -> None:
    structlog.get_logger().debug(f"to {PERSON}", field=value)
    _is_masked(stderr)


def test_an_address_in_a_bound_context_is_masked(stderr: _Stderr, stdlib: logging.Logger) -> None:
    with structlog.contextvars.bound_contextvars(email=PERSON):
        stdlib.info("sent")
    _is_masked(stderr)


def test_only_the_first_character_of_an_international_address_is_shown(stderr: _Stderr, stdlib: logging.Logger) -> None:
    stdlib.info("to %s", UNICODE_PERSON)
    structlog.get_logger().info("sent", email=UNICODE_PERSON, nested=[UNICODE_PERSON], escaped=ascii(UNICODE_PERSON))
    text = stderr.getvalue()
    for character in UNICODE_PERSON.partition("@")[0][1:]:
        assert character not in text
        assert ascii(character).strip("'") not in text


def test_without_a_terminal_each_line_is_one_json_object(stderr: _Stderr, stdlib: logging.Logger) -> None:
    stdlib.info("to %s", PERSON)
    structlog.get_logger("ours").warning("sent", email=PERSON, tries=2)
    if stderr.terminal:
        return
    first, second = map(json.loads, stderr.getvalue().splitlines())
    assert first["event"] == f"to {MASKED}"
    assert first["logger"] == "some.library"
    assert (second["level"], second["email"], second["tries"]) == ("warning", MASKED, 2)
    assert second["timestamp"].endswith("Z")


def test_lines_below_the_level_are_not_written(stderr: _Stderr, stdlib: logging.Logger) -> None:
    logs.configure(logging.WARNING)
    stdlib.info("quiet")
    structlog.get_logger().info("quiet")
    assert stderr.getvalue() == ""


@pytest.mark.parametrize(
    ("email", "masked"),
    [
        (PERSON, MASKED),
        (" anna@example.com ", "a***@example.com"),
        ("a@b@example.com", "a***@example.com"),
        ("@example.com", "***@example.com"),
        ("no address", "***"),
        ("", "***"),
        (None, "***"),
        (["anna@example.com"], "***"),
    ],
)
def test_a_masked_address_keeps_its_first_character_and_its_domain(email: object, masked: str) -> None:
    assert masking.mask_email(email) == masked


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"<{PERSON}>", f"<{MASKED}>"),
        (f"RCPT TO:<{PERSON}> SMTPUTF8", f"RCPT TO:<{MASKED}> SMTPUTF8"),
        (f'{{"email": "{PERSON}"}}', f'{{"email": "{MASKED}"}}'),
        (f"code_{PERSON}", "c***@example.com"),
        (f"code:reset:{PERSON}", f"code:reset:{MASKED}"),
        (f"https://example.com/{PERSON}", "https://e***@example.com"),
        (f"https://example.com/?to={PERSON}", "https://e***@example.com"),
        (f"id={PERSON}", "i***@example.com"),
        ("x=o'brien{7}@example.com", "x***@example.com"),
        ('to <"anna secret"@example.com>', 'to <"***@example.com>'),
        (r'"\"anna\" secret\\"@example.com', '"***@example.com'),
        ('{"one": "x", "two": "@example.com"}', '{"one": "x", "two": "@example.com"}'),
        ("anna@[127.0.0.1]", "a***@[127.0.0.1]"),
        ("smtp://anna:it's@relay.example.com", "smtp://***@relay.example.com"),
        (f"one\\n{PERSON}", "o***@example.com"),
        (MASKED, MASKED),
        ("no address here", "no address here"),
    ],
)
def test_every_address_in_a_text_is_masked_and_the_rest_stays(text: str, masked: str) -> None:
    assert masking.mask_text(text) == masked


ATEXT = string.ascii_letters + string.digits + "!#$%&'*+-/=?^_`{|}~"
BEYOND_ASCII = st.characters(min_codepoint=0xA1, categories=["L", "M", "N", "S", "P"])
ANY_ATEXT = st.sampled_from(ATEXT) | BEYOND_ASCII
ATOMS = st.lists(st.text(ANY_ATEXT, max_size=8), max_size=3).map(".".join)
QUOTED = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20).map(
    lambda text: re.sub(r'(["\\])', r"\\\1", text)
)
LOCAL_PARTS = st.one_of(
    st.tuples(ANY_ATEXT, ATOMS).map(lambda parts: "{}secret{}secret".format(*parts)),
    QUOTED.map(lambda text: f'"secret{text}secret"'),
)
DOMAINS = st.sampled_from(["example.com", "sub.example.co.uk", "例子.中国", "xn--fsqu00a.xn--fiqs8s", "[192.0.2.1]"])
# Where an address may stand in a line: alone, in a sentence, in Python's and in JSON's writing of a value.
WRITTEN: list[Callable[[str], str]] = [
    str,
    "550 <{}> unknown".format,
    "to {}, to b@example.org".format,
    "id={}".format,
    "user:{}:1".format,
    "\x1b[35m{}\x1b[0m".format,
    lambda address: repr({"email": address}),
    lambda address: json.dumps({"email": [address], "to": "@"}),
    lambda address: json.dumps({"email": address}, ensure_ascii=False),
    lambda address: json.dumps(json.dumps({"email": address}, ensure_ascii=False), ensure_ascii=False),
    ascii,
]


@pytest.mark.parametrize("write", WRITTEN, ids=lambda write: write("@"))
@given(local=LOCAL_PARTS, domain=DOMAINS)
def test_no_address_of_any_characters_is_shown_whole(write: Callable[[str], str], local: str, domain: str) -> None:
    address = f"{local}@{domain}"
    masked = masking.mask_text(write(address))
    assert "secret" not in masked
    assert "***@" in masked
    assert masking.mask_text(masked) == masked
    assert "secret" not in masking.mask_email(address)


LONG = 2**20  # characters: with a time that grows with the square, the test would take an hour


@pytest.mark.parametrize(
    "text",
    [
        *("a" * LONG + " @", "://" + "a:" * LONG, '"' * LONG + "@", "\\" * LONG + '"@', "\x1b[" + "1" * LONG + "@"),
        *("://" * (LONG // 9) + "@", "\x1b[0m" * (LONG // 9) + "@", "\x1b[0" * (LONG // 9) + "@"),
        *("a@" * (LONG // 9), "=@" * (LONG // 9), '"@' * (LONG // 9), '\\"@' * (LONG // 9), '\\"' * (LONG // 9) + "@"),
        *(("\\" * 500 + '"@') * (LONG // 502), ('\\"' * 500 + ' "@') * (LONG // 1003)),
    ],
    ids=lambda text: repr(text[:4]),
)
def test_a_long_hostile_text_is_masked_in_time(text: str) -> None:
    assert masking.mask_text(text)


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+sentinel", "smtp", "smtps"])
@pytest.mark.parametrize("user", ["", "user:p@ss:w0rd@", ":pass@", "user@", "***@"])
def test_a_url_is_masked_once_and_for_all(scheme: str, user: str, stderr: _Stderr, stdlib: logging.Logger) -> None:
    url = f"{scheme}://{user}one.example:25,two.example/0"
    masked = f"{scheme}://{'***@' if user else ''}one.example:25,two.example/0"
    assert mask_url(url) == masked
    assert masking.mask_text(url) == masking.mask_text(masked) == masked
    stdlib.warning("%s is down", url)
    stdlib.warning("%s is down", mask_url(url))
    assert stderr.getvalue().count(f"{masked} is down") == 2
