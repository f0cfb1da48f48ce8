"""Which strings are addresses, and which of them name the same mailbox."""

from __future__ import annotations

import unicodedata

import email_validator
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from producer import address
from producer.errors import InvalidAddress

ASCII_LOCAL = st.text("abcXYZ019!#$%&'*+/=?^_`{|}~-.", min_size=1, max_size=66)
LABELS = st.lists(st.text("abzXY09-", min_size=1, max_size=66), min_size=1, max_size=5)
DOMAINS = LABELS.map(".".join)
NEAR_ADDRESSES = st.tuples(ASCII_LOCAL, st.sampled_from(["@", "@", "@", "@@", "", " @"]), DOMAINS).map("".join)


def _library(text: str) -> tuple[str, str]:
    found = email_validator.validate_email(text, check_deliverability=False, strict=True)
    return found.local_part, found.ascii_domain or ""


@given(NEAR_ADDRESSES | st.emails() | st.text(max_size=80))
@example(f"{'a' * 64}@example.com")
@example(f"{'a' * 65}@example.com")
@example(f"a@{'b' * 63}.com")
@example(f"a@{'b' * 64}.com")
@example("a@xn--a.com")
@example("a@ab--c.com")
@example("a@example.c")
@example("a@example.co1")
@example("a@1.2.3.4")
@example(".a@example.com")
@example("a.@example.com")
@example("a..b@example.com")
@example("a@-b.com")
@example("a@b-.com")
def test_the_fast_path_agrees_with_the_library_on_all_it_accepts(text: str) -> None:
    if not address._PLAIN.fullmatch(text) or _is_special(text):
        return
    local, domain = _library(text)
    assert address.parse(text).mailbox == f"{local}@{domain}"


@given(NEAR_ADDRESSES | st.emails())
def test_whatever_the_library_accepts_is_an_address(text: str) -> None:
    try:
        local, domain = _library(text)
    except email_validator.EmailNotValidError:
        return
    assert address.parse(text).mailbox == f"{local}@{domain}"


def _is_special(text: str) -> bool:
    domain = text.rpartition("@")[2].lower()
    return any(f".{domain}".endswith(f".{name}") for name in email_validator.SPECIAL_USE_DOMAIN_NAMES)


@pytest.mark.parametrize(
    "text",
    [
        "a@example.com",
        "first.last+tag@sub.example.co.uk",
        "o'brien@example.org",
        "a@localhost",
        "a@mail.localhost",
        "a@chat.test",
        "a@chat.invalid",
        "a@printer.local",
        "ü@chat.test",
        "用户@example.com",
        "a@bücher.example",
        "a@xn--bcher-kva.example",
    ],
)
def test_valid_addresses(text: str) -> None:
    assert address.parse(text)


@pytest.mark.parametrize(
    "raw",
    [
        "",
        " ",
        "   ",
        "a",
        "@",
        "a@",
        "@example.com",
        "a@example",
        "a@.test",
        "a@chat..test",
        "a@chat.test.",
        "a@-chat.test",
        "a b@example.com",
        "a@exa mple.com",
        "a@b@example.com",
        "a@[127.0.0.1]",
        '"a b"@example.com',
        "A <a@example.com>",
        "a@example.com,b@example.com",
        "a@example.com>",
        "a" * 10_000,
        "a" * 10_000 + "@example.com",
        "a@" + "b." * 5_000 + "com",
        "a@\ud800.com",
        "\ud800@example.com",
    ],
)
def test_invalid_addresses(raw: str) -> None:
    with pytest.raises(InvalidAddress):
        address.parse(raw)


@pytest.mark.parametrize("raw", [None, 1, 1.5, True, b"a@example.com", ["a@example.com"], {"email": "a@example.com"}])
def test_only_a_string_is_an_address(raw: object) -> None:
    with pytest.raises(InvalidAddress):
        address.parse(raw)


@pytest.mark.parametrize("character", list("\r\n\0\t\x0b\x1b\x7f\x85\u2028\u00a0\u3000\u200b"))
@pytest.mark.parametrize("place", ["{}a@example.com", "a{}b@example.com", "a@exa{}mple.com", "a@example.com{}"])
def test_control_characters_and_other_blanks_are_refused_anywhere(character: str, place: str) -> None:
    with pytest.raises(InvalidAddress):
        address.parse(place.format(character))


@given(st.text())
def test_no_mailbox_can_end_an_smtp_command(text: str) -> None:
    for raw in (text, f"{text}@example.com", f"a@{text}.com", f"a@example.com{text}"):
        try:
            found = address.parse(raw)
        except InvalidAddress:
            continue
        for form in found:
            assert not any(unicodedata.category(c) in {"Cc", "Zs", "Zl", "Zp", "Cs"} or c in "<>" for c in form)


def test_spaces_do_not_make_an_address_of_any_length() -> None:
    spaces = " " * (address.MAX_GIVEN - len("a@example.com"))
    assert address.parse(f"{spaces}a@example.com").mailbox == "a@example.com"
    for email in (f"{spaces} a@example.com", f"a@example.com{spaces} "):
        with pytest.raises(InvalidAddress):
            address.parse(email)
        assert not address.is_address(email)


def test_surrounding_spaces_are_trimmed() -> None:
    assert address.parse("  a@example.com ") == address.parse("a@example.com")


def test_the_error_never_quotes_the_input() -> None:
    for raw in ("secret.person@", "secret.person@exa mple.com", "secret.person@b@example.com", "secret.person" * 1000):
        with pytest.raises(InvalidAddress) as caught:
            address.parse(raw)
        assert "secret" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_an_international_domain_is_sent_in_its_ascii_form() -> None:
    found = address.parse("a@Bücher.example")
    assert found.mailbox == "a@xn--bcher-kva.example"
    assert not found.needs_smtputf8


def test_an_international_local_part_needs_smtputf8() -> None:
    assert address.parse("用户@例子.中国").needs_smtputf8
    assert not address.parse("user@例子.中国").needs_smtputf8


def test_the_local_part_is_sent_as_it_was_written() -> None:
    assert address.parse("First.Last@Example.COM").mailbox == "First.Last@example.com"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a@example.com", " a@example.com  "),
        ("Anna@Example.com", "anna@example.COM"),
        ("a@bücher.example", "a@xn--bcher-kva.example"),
        ("a@BÜCHER.example", "a@xn--bcher-kva.example"),
        ("jos\u00e9@example.com", "jose\u0301@example.com"),
        ("JOS\u00c9@example.com", "jos\u00e9@example.com"),
        ("A@Chat.TEST", "a@chat.test"),
        ("POSTMASTER@example.com", "postmaster@example.com"),
    ],
)
def test_spellings_of_one_mailbox_are_equal(one: str, other: str) -> None:
    assert address.parse(one).canonical == address.parse(other).canonical


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a.b@example.com", "ab@example.com"),
        ("a+tag@example.com", "a@example.com"),
        ("a@example.com", "a@mail.example.com"),
    ],
)
def test_dots_and_plus_tags_make_another_address(one: str, other: str) -> None:
    assert address.parse(one).canonical != address.parse(other).canonical


@given(st.text(min_size=1, max_size=20).map(lambda local: f"{local}@example.com"))
def test_the_canonical_form_is_stable(text: str) -> None:
    try:
        found = address.parse(text)
    except InvalidAddress:
        return
    assert address.parse(found.canonical).canonical == found.canonical


@given(
    st.sampled_from([" a@example.com ", "a@example.com\n", "a" * 250 + "@b.example", "用户@例子.中国", "", 7])
    | st.text(max_size=20)
    | st.from_regex(r"[ -~]{1,70}@[a-z0-9.-]{1,60}\.?[a-z]{0,5}", fullmatch=True)
    | st.emails()
    | st.none()
    | st.binary()
)
def test_is_address_agrees_with_parse(raw: object) -> None:
    try:
        address.parse(raw)
    except InvalidAddress:
        assert not address.is_address(raw)
    else:
        assert address.is_address(raw)
