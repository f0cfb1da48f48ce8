"""Requests that a worker can read but not fulfil, and how it answers them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.caller import address, message
from support.rig import Rig, parsed


@pytest.mark.parametrize(
    "email",
    [
        "",
        "   ",
        "not an address",
        "a@",
        "@example.com",
        "a@b@example.com",
        "a" * 10_240,
        "a" * 10_240 + "@example.com",
        "a@example.com\r\nBcc: b@example.com",
        "a@example.com\n",
        "a\x00@example.com",
        "\ud800@example.com",
        0,
        42,
        1.5,
        True,
        None,
        [],
        ["a@example.com"],
        10**400,
        [[[[["a@example.com"]]]]],
        {},
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


@pytest.mark.parametrize("locale", ["xx", "", "e" * 10_000, 5, [], {}, True], ids=lambda value: repr(value)[:9])
def test_an_unknown_locale_falls_back_to_the_setting(rig: Rig, locale: Any) -> None:
    email = address()
    assert rig.caller.ask(email, locale=locale)["error"] == 0
    [mail] = rig.mails_to(email)
    assert parsed(mail)["Content-Language"] == "en"


def test_a_known_locale_sets_the_mails_language(rig: Rig) -> None:
    email = address()
    assert rig.caller.ask(email, locale="zh-CN")["error"] == 0
    [mail] = rig.mails_to(email)
    assert parsed(mail)["Content-Language"] == "zh-CN"


def test_a_special_use_domain_is_accepted(rig: Rig) -> None:
    assert rig.caller.ask("a@mailbox.test")["error"] == 0


def test_an_international_domain_is_sent_to_in_ascii_form(rig: Rig) -> None:
    assert rig.caller.ask("用户@例子.com") == {"email": "用户@例子.com", "error": 0}
    assert len(rig.mails_to("用户@xn--fsqu00a.com")) == 1


def test_the_same_id_again_gets_the_same_reply_and_no_second_mail(rig: Rig) -> None:
    email = address()
    again = message({"email": email})
    [request_id] = rig.caller.push(again)
    first = rig.caller.reply(request_id)
    rig.results.delete(f"celery-task-meta-{request_id}")
    rig.caller.push(again)
    assert rig.caller.reply(request_id) == first
    assert len(rig.mails_to(email)) == 1


def test_the_same_id_with_another_address_is_dead_lettered(rig: Rig) -> None:
    email, other = address(), address()
    [request_id] = rig.caller.push(message({"email": email}))
    first = rig.caller.reply(request_id)
    before = rig.broker.llen("verification.dead")
    rig.caller.push(message({"email": other}, request_id=request_id))
    rig.settled()
    assert rig.broker.llen("verification.dead") == before + 1
    assert rig.caller.reply(request_id) == first
    assert rig.codes.exists(f"code_{other}") == 0
    assert rig.mails_to(other) == []


@pytest.mark.parametrize(
    "enqueued_at", [-1, "soon", None, True, [], 10**400, 1e308, 9e15], ids=lambda value: repr(value)[:9]
)
def test_an_invalid_enqueued_at_is_ignored(rig: Rig, enqueued_at: Any) -> None:
    [request_id] = rig.caller.push(message({"email": address()}, headers={"enqueued_at": enqueued_at}))
    old = isinstance(enqueued_at, int) and enqueued_at == -1
    assert rig.caller.reply(request_id)["error"] == (6 if old else 0)
