"""`python -m worker dead`: dead letters are listed and shown masked, replayed like any request, and dropped."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from typing import Any
from urllib.request import urlopen

import pytest
from support.caller import address, message
from support.process import ROOT, eventually
from support.rig import Rig
from typer.testing import CliRunner, Result

from producer.masking import mask_email
from worker.cli import app

Dead = Callable[..., Result]


@pytest.fixture
def dead(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Dead:
    """Runs the command in this process. There are no dead letters at first."""
    rig.broker.delete("verification.dead")
    for name, value in rig.settings.items():
        monkeypatch.setenv(name, value)
    return lambda *arguments: CliRunner().invoke(app, ["dead", *arguments])


def letter(rig: Rig, envelope: Any, *, reason: str = "a reason", at: float | None = None) -> None:
    """Push a dead letter, as an older worker does: without a code."""
    text = envelope if isinstance(envelope, str) else json.dumps(envelope)
    entry = {"reason": reason, "at": time.time() if at is None else at, "message": text}
    rig.broker.lpush("verification.dead", json.dumps(entry))


def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own, its output piped."""
    return subprocess.run(
        [sys.executable, "-m", "worker", "dead", *arguments],
        cwd=ROOT,
        env=settings,
        capture_output=True,
        text=True,
        check=False,
    )


def names(dead: Dead) -> list[str]:
    return [json.loads(line)["name"] for line in dead("list", "--json").output.splitlines()]


def test_the_list_shows_what_a_worker_dead_lettered_newest_first(rig: Rig, dead: Dead) -> None:
    assert "no dead letters" in dead("list").output
    email, request_id = address(), str(uuid.uuid4())
    began = time.time()
    rig.broker.lpush("verification", "junk")
    rig.broker.brpoplpush("verification.dead", "verification.dead", 10)
    rig.caller.push(message({"email": email}, request_id=request_id, content_type="text/plain"))
    rig.caller.ask(address())
    newest, oldest = (json.loads(line) for line in dead("list", "--json").output.splitlines())
    assert (newest["code"], newest["reason"]) == ("envelope", "content-type is not application/json")
    assert newest["id"] == request_id
    assert newest["email"] == f"{email[0]}***@example.com"
    assert began - 1 <= datetime.fromisoformat(newest["at"]).timestamp() <= time.time()
    assert (oldest["reason"], oldest["id"], oldest["email"]) == ("not JSON", None, None)
    listed = dead("list").output
    assert newest["name"] in listed
    assert email not in listed
    assert "1 more: --most 2" in dead("list", "--most", "1").output


def test_the_list_breaks_no_words_at_80_columns_or_in_a_pipe(
    rig: Rig, dead: Dead, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_id, reason = str(uuid.uuid4()), "no exchange or routing_key in the delivery_info"
    email = "anna@a-rather-long-domain-name.example.com"
    letter(rig, message({"email": email}, request_id=request_id), reason=reason)
    letter(rig, message({"email": "a\x1b[2J@example.com"}, request_id="two\nlines"), reason="unknown task")
    monkeypatch.setenv("COLUMNS", "80")
    for output in (dead("list").output, run("list", **rig.settings).stdout):
        lines = output.splitlines()
        assert [len(lines), max(map(len, lines)) <= 80] == [6, True]
        assert [word in output for word in (request_id, f"-: {reason}", mask_email(email))] == [True] * 3
        assert "\x1b" not in output


def test_show_hides_the_body_and_masks_addresses(rig: Rig, dead: Dead) -> None:
    email = address()
    envelope = message({"email": email}, headers={"argsrepr": f"('{email}',)", "origin": email})
    letter(rig, envelope)
    [name] = names(dead)
    for shown in (dead("show", name), dead("show", name, "--json")):
        assert shown.exit_code == 0
        assert "delivery_tag" in shown.output
        assert email not in shown.output
        assert envelope["body"] not in shown.output


def test_a_replayed_request_keeps_its_age(rig: Rig, dead: Dead) -> None:
    young, old, given = address(), address(), address()
    messages = [message({"email": email}) for email in (young, old)]
    messages.append(message({"email": given}, headers={"enqueued_at": time.time() - 301}))
    for each, at in zip(messages, (None, time.time() - 301, None), strict=True):
        letter(rig, each, at=at)
    done = dead("replay", "--all")
    assert (done.exit_code, done.output.count("back on the queue")) == (0, 3)
    assert rig.caller.replies([each["headers"]["id"] for each in messages]) == [0, 6, 6]
    assert [len(rig.mails_to(email)) for email in (young, old, given)] == [1, 0, 0]
    assert names(dead) == []


def test_a_replayed_request_that_was_answered_sends_no_second_mail(rig: Rig, dead: Dead) -> None:
    email = address()
    envelope = message({"email": email})
    [request_id] = rig.caller.push(envelope)
    assert rig.caller.reply(request_id)["error"] == 0
    rig.codes.delete(f"cooldown:code_{email}")
    rig.results.delete(f"celery-task-meta-{request_id}")
    letter(rig, envelope)
    assert dead("replay", *names(dead)).exit_code == 0
    assert rig.caller.reply(request_id)["error"] == 0
    assert len(rig.mails_to(email)) == 1


def test_an_unfit_message_is_not_replayed(rig: Rig, dead: Dead) -> None:
    letter(rig, "junk")
    letter(rig, message({"email": address()}))
    done = dead("replay", "--all")
    assert done.exit_code == 1
    assert "still cannot be executed" in done.output
    assert "back on the queue" in done.output
    assert len(names(dead)) == 1


def test_a_letter_that_was_cut_says_so_and_is_not_replayed(rig: Rig, dead: Dead) -> None:
    email, request_id = address(), str(uuid.uuid4())
    raw = json.dumps(message({"email": email, "extra": "x" * 70_000}, request_id=request_id)).encode()
    rig.broker.lpush("verification", raw)
    assert rig.caller.reply(request_id)["error"] == 2
    eventually(lambda: rig.broker.llen("verification.dead") == 1)
    [fields] = (json.loads(line) for line in dead("list", "--json").output.splitlines())
    assert (fields["code"], fields["id"], fields["size"]) == ("too_large", request_id, len(raw))
    shown = dead("show", fields["name"])
    assert f"the first 1024 of {len(raw)} bytes" in shown.output
    assert raw[:100].decode() not in shown.output
    done = dead("replay", "--all")
    assert (done.exit_code, done.output.count("only the first 1024")) == (1, 1)
    assert names(dead) == [fields["name"]]


def test_a_letter_that_would_be_too_large_is_not_replayed(rig: Rig, dead: Dead) -> None:
    envelope = message({"email": address()}, headers={"origin": "\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 20_000})
    letter(rig, json.dumps(envelope, ensure_ascii=False))
    done = dead("replay", "--all")
    assert (done.exit_code, done.output.count("65536 are allowed")) == (1, 1)
    assert len(names(dead)) == 1


def removed(rig: Rig, bound: str) -> float:
    """How many dead letters the worker has removed for this reason."""
    with urlopen(rig.worker.metrics_url) as page:  # noqa: S310 - the worker's own
        [value] = re.findall(rf'dead_letters_removed_total{{bound="{bound}"}} ([\d.]+)', page.read().decode())
    return float(value)


def test_dead_letters_go_after_seven_days(rig: Rig, dead: Dead) -> None:
    before, now, days = removed(rig, "age"), time.time(), 86_400
    old, young = address(), address("young")
    entries = [
        *(({"email": old}, now - age * days) for age in (8, 7.01)),
        (None, 0.0),
        ({"email": old}, now - 7.01 * days),
        ({"email": young}, now - 6.99 * days),
        (None, 0.0),
    ]
    with rig.broker.pipeline() as pipe:
        for kwargs, at in entries:
            entry = {"reason": "a reason", "at": at, "message": json.dumps(message(kwargs, headers={"at": now}))}
            pipe.lpush("verification.dead", "not written by a worker" if kwargs is None else json.dumps(entry))
        pipe.execute()
    eventually(lambda: removed(rig, "age") - before == 4)
    listed = [json.loads(line)["email"] for line in dead("list", "--json").output.splitlines()]
    assert listed == [None, mask_email(young)]
    assert "dead letters were removed: 4 older than 7 days, 0 beyond" in rig.worker.log


def test_only_the_newest_10000_dead_letters_are_kept(rig: Rig) -> None:
    rig.broker.delete("verification.dead")
    before, now = removed(rig, "number"), time.time()
    entries = [json.dumps({"reason": "a reason", "at": now, "message": str(number)}) for number in range(10_007)]
    rig.broker.lpush("verification.dead", *entries)
    eventually(lambda: removed(rig, "number") - before == 7)
    kept = [json.loads(each)["message"] for each in rig.dead_letters()]
    assert kept == [str(number) for number in range(10_006, 6, -1)]
    rig.broker.delete("verification.dead")


@pytest.mark.parametrize("depth", [940, 980, 1010, 20_000])
def test_a_deeply_nested_letter_stops_no_command(depth: int, rig: Rig, dead: Dead) -> None:
    text, nested = json.dumps(message({"email": address()})), "[" * depth + "]" * depth
    letter(rig, f'{text[:-1]}, "extra": {nested}}}')
    rig.broker.lpush("verification.dead", nested)
    assert dead("show", *names(dead)).exit_code == 0
    assert not isinstance(dead("replay", "--all").exception, RecursionError)
    assert dead("drop", "--all").exit_code == 0


def test_only_the_named_letters_are_dropped(rig: Rig, dead: Dead) -> None:
    for _ in range(3):
        letter(rig, message({"email": address()}))
    one, *others = names(dead)
    assert dead("drop", one).exit_code == 0
    assert names(dead) == others
    assert dead("drop", "--all").exit_code == 0
    assert names(dead) == []


@pytest.mark.parametrize("arguments", [("replay",), ("drop",), ("replay", "--all", "x"), ("show",), ("discard",)])
def test_wrong_usage_exits_with_2(dead: Dead, arguments: tuple[str, ...]) -> None:
    assert dead(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://127.0.0.1:{port}", "No dead letter has that name"),
        ("redis://:hush-hush@127.0.0.1:1", "Redis at redis://***@127.0.0.1:1/1 cannot be used (ConnectionError)"),
        ("redis://me:hush-hush@127.0.0.1:{port}", "Redis at redis://***@127.0.0.1:{port}/1 refused the login"),
    ],
)
def test_an_error_is_one_line_and_exits_with_1(rig: Rig, url: str, says: str) -> None:
    done = run("show", "nothing", VERIFY_REDIS_URL=url.format(port=rig.server.port))
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(says.format(port=rig.server.port))
