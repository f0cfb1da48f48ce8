"""Requests that a worker can read but not fulfil, and how it answers them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.caller import address
from support.rig import Rig, parsed


@pytest.mark.parametrize(
    "email",
    [
        "",
        "a" * 10_240 + "@example.com",
        "a@example.com\r\nBcc: b@example.com",
        "\ud800@example.com",
        1.5,
        True,
        None,
        10**400,
        [[[[["a@example.com"]]]]],
        {"email": "a@example.com"},
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_an_invalid_address_is_answered_3_and_echoed(rig: Rig, email: Any) -> None:
    reply = rig.caller.ask(email)
    assert json.dumps(reply) == json.dumps({"email": email, "error": 3})


@pytest.mark.parametrize(
    "purpose",
    ["", "Upper", "a b", "a" * 33, "a:b", "a\n", "ü", None, 7, True, [], {}],
    ids=lambda value: repr(value)[:9],
)
def test_a_malformed_purpose_is_answered_2_and_sends_nothing(rig: Rig, purpose: Any) -> None:
    email = address()
    assert rig.caller.ask(email, purpose=purpose) == {"email": email, "error": 2}
    assert rig.mails_to(email) == []
    assert list(rig.codes.scan_iter(f"*{email}*")) == []


def test_each_purpose_has_its_own_code(rig: Rig) -> None:
    email = address()
    assert rig.caller.ask(email, purpose="reset_pass-1")["error"] == 0
    assert rig.codes.exists(f"code_{email}") == 0
    assert rig.codes.ttl(f"code:reset_pass-1:{email}") > 0


@pytest.mark.parametrize(
    "locale", ["zh-CN", "xx", "", "e" * 10_000, 5, [], {}, True], ids=lambda value: repr(value)[:9]
)
def test_a_known_locale_sets_the_language_and_any_other_is_ignored(rig: Rig, locale: Any) -> None:
    email = address()
    assert rig.caller.ask(email, locale=locale)["error"] == 0
    [mail] = rig.mails_to(email)
    assert parsed(mail)["Content-Language"] == ("zh-CN" if locale == "zh-CN" else "en")


def test_an_international_domain_is_sent_to_in_ascii_form(rig: Rig) -> None:
    assert rig.caller.ask("用户@例子.com") == {"email": "用户@例子.com", "error": 0}
    assert len(rig.mails_to("用户@xn--fsqu00a.com")) == 1
