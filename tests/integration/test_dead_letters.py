"""`python -m worker dead`: dead letters are listed and shown masked, replayed by the rules for any request, dropped."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from support.caller import address, message
from support.process import ROOT
from support.rig import Rig
from typer.testing import CliRunner, Result

from worker.cli import app

Dead = Callable[..., Result]


@pytest.fixture
def dead(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Dead:
    """Runs the command, with no dead letters at first."""
    rig.broker.delete("verification.dead")
    for name, value in rig.settings.items():
        monkeypatch.setenv(name, value)
    return lambda *arguments: CliRunner().invoke(app, ["dead", *arguments])


def letter(rig: Rig, envelope: Any, *, reason: str = "a reason", at: float | None = None) -> None:
    """Leave one, as the worker does."""
    text = envelope if isinstance(envelope, str) else json.dumps(envelope)
    entry = {"reason": reason, "at": time.time() if at is None else at, "message": text}
    rig.broker.lpush("verification.dead", json.dumps(entry))


def names(dead: Dead) -> list[str]:
    return [json.loads(line)["name"] for line in dead("list", "--json").output.splitlines()]


def test_what_a_worker_buried_is_listed_newest_first_with_reason_time_id_and_masked_address(
    rig: Rig, dead: Dead
) -> None:
    assert "no dead letters" in dead("list").output
    email, request_id = address(), str(uuid.uuid4())
    began = time.time()
    rig.broker.lpush("verification", "junk")
    rig.broker.brpoplpush("verification.dead", "verification.dead", 10)
    rig.caller.push(message({"email": email}, request_id=request_id, content_type="text/plain"))
    rig.caller.ask(address())
    newest, oldest = (json.loads(line) for line in dead("list", "--json").output.splitlines())
    assert (newest["reason"], newest["id"]) == ("content-type is not application/json", request_id)
    assert newest["email"] == f"{email[0]}***@example.com"
    assert began - 1 <= datetime.fromisoformat(newest["at"]).timestamp() <= time.time()
    assert (oldest["reason"], oldest["id"], oldest["email"]) == ("not JSON", None, None)
    table = dead("list").output
    assert newest["name"] in table
    assert email not in table
    assert "1 more: --most 2" in dead("list", "--most", "1").output


def test_a_letter_is_shown_without_its_body_and_with_addresses_masked(rig: Rig, dead: Dead) -> None:
    email = address()
    envelope = message({"email": email}, headers={"argsrepr": f"('{email}',)", "origin": email})
    letter(rig, envelope)
    [name] = names(dead)
    for shown in (dead("show", name), dead("show", name, "--json")):
        assert shown.exit_code == 0
        assert "delivery_tag" in shown.output
        assert email not in shown.output
        assert envelope["body"] not in shown.output


def test_a_replayed_letter_is_served_as_a_request_of_its_age(rig: Rig, dead: Dead) -> None:
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


def test_a_replayed_letter_whose_request_was_answered_brings_no_second_mail(rig: Rig, dead: Dead) -> None:
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


def test_what_is_still_unfit_is_not_replayed_and_stays(rig: Rig, dead: Dead) -> None:
    letter(rig, "junk")
    letter(rig, message({"email": address()}))
    done = dead("replay", "--all")
    assert done.exit_code == 1
    assert "still unfit" in done.output
    assert "back on the queue" in done.output
    assert len(names(dead)) == 1


def test_dropped_letters_are_gone_and_no_others(rig: Rig, dead: Dead) -> None:
    for _ in range(3):
        letter(rig, message({"email": address()}))
    one, *others = names(dead)
    assert dead("drop", one).exit_code == 0
    assert names(dead) == others
    assert dead("drop", "--all").exit_code == 0
    assert names(dead) == []


@pytest.mark.parametrize("arguments", [("replay",), ("drop",), ("replay", "--all", "x"), ("show",), ("bury",)])
def test_wrong_usage_is_status_2(dead: Dead, arguments: tuple[str, ...]) -> None:
    assert dead(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (None, "There is no dead letter with that name"),
        ("redis://:hush-hush@127.0.0.1:1", "Redis at redis://***@127.0.0.1:1/1 cannot be used"),
    ],
)
def test_what_goes_wrong_is_one_line_and_status_1(rig: Rig, url: str | None, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "worker", "dead", "show", "nothing"],
        cwd=ROOT,
        env={"VERIFY_REDIS_URL": url or rig.settings["VERIFY_REDIS_URL"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(says)
