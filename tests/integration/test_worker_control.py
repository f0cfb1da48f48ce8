"""`celery inspect` and `celery control` against a real worker."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from support.caller import TASK, address, message
from support.process import WAIT_TIMEOUT, eventually
from support.rig import Rig, operator_app
from support.smtp_server import Held


@pytest.fixture(scope="module")
def app(rig: Rig) -> Iterator[Celery]:
    with operator_app(rig) as app:
        yield app


def ask(rig: Rig, app: Celery, question: str, *args: Any) -> Any:
    """The worker's own answer."""
    answers = getattr(app.control.inspect([rig.worker.name], timeout=WAIT_TIMEOUT, limit=1), question)(*args)
    assert answers, f"no answer to {question}"
    return answers[rig.worker.name]


def celery(rig: Rig, *words: str) -> str:
    """The command line, as an operator types it."""
    to = [] if words[0] == "call" else ["-d", rig.worker.name]
    command = [sys.executable, "-m", "celery", "-A", "worker.app", *words, *to]
    environment = {**rig.worker.environment, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ping(rig: Rig, app: Celery) -> None:
    assert ask(rig, app, "ping") == {"ok": "pong"}


def test_stats_count_every_request(rig: Rig, app: Celery) -> None:
    before = ask(rig, app, "stats")["total"].get(TASK, 0)
    rig.caller.replies(rig.caller.push(*(message({"email": address()}) for _ in range(10))))
    eta = (datetime.now(UTC) + timedelta(seconds=0.2)).isoformat()
    rig.caller.reply(rig.caller.push(message({"email": address()}, headers={"eta": eta}))[0])
    assert ask(rig, app, "stats")["total"][TASK] == before + 11


def test_active_queues_name_the_queue(rig: Rig, app: Celery) -> None:
    assert [queue["name"] for queue in ask(rig, app, "active_queues")] == ["verification"]


def test_registered_names_the_task(rig: Rig, app: Celery) -> None:
    assert TASK in ask(rig, app, "registered")


def test_a_request_being_sent_is_active_and_masked(rig: Rig, app: Celery) -> None:
    email, hold = address("secret"), Held("250 ok")
    rig.script(email, dot=hold)
    request_id = rig.caller.request(email)
    assert hold.reached.wait(60)

    [active] = ask(rig, app, "active")
    assert active["id"] == request_id
    assert active["name"] == TASK
    assert active["kwargs"] == {"email": "s***@example.com"}
    assert ask(rig, app, "query_task", request_id)[request_id][0] == "active"
    assert ask(rig, app, "reserved") == []
    assert "secret" not in str([ask(rig, app, each) for each in ("active", "reserved", "stats")])

    hold.release.set()
    assert rig.caller.reply(request_id)["error"] == 0
    eventually(lambda: ask(rig, app, "active") == [])
    assert ask(rig, app, "query_task", request_id) == {}


def test_every_request_has_events_without_its_address(rig: Rig) -> None:
    email = address("secret")
    request_id = rig.caller.request(email)
    rig.caller.reply(request_id)

    def mine() -> list[dict[str, Any]]:
        return [event for event in rig.events() if event["uuid"] == request_id]

    eventually(lambda: len(mine()) == 3)
    assert [event["type"] for event in mine()] == ["task-received", "task-started", "task-succeeded"]
    received, _started, succeeded = mine()
    assert received["name"] == TASK
    assert received["kwargs"] == "{'email': 's***@example.com'}"
    assert succeeded["result"] == "{'email': 's***@example.com', 'error': 0}"
    assert succeeded["runtime"] >= 0
    assert "secret" not in json.dumps(mine())


def test_cancel_consumer_and_add_consumer(rig: Rig, app: Celery) -> None:
    app.control.cancel_consumer("verification", destination=[rig.worker.name], reply=True)
    eventually(lambda: ask(rig, app, "active_queues") == [])
    request_id = rig.caller.request(address())
    assert ask(rig, app, "ping") == {"ok": "pong"}
    assert rig.broker.llen("verification") == 1
    assert rig.results.exists(f"celery-task-meta-{request_id}") == 0

    app.control.add_consumer("verification", destination=[rig.worker.name], reply=True)
    assert rig.caller.reply(request_id)["error"] == 0
    assert [queue["name"] for queue in ask(rig, app, "active_queues")] == ["verification"]


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        ("rate_limit", {"task_name": TASK, "rate_limit": "1/h"}, "rate limits do not apply here"),
        ("time_limit", {"task_name": TASK, "soft": 1, "hard": 2}, "time limits do not apply here"),
        ("pool_grow", {"n": 2}, "by no pool"),
        ("pool_shrink", {"n": 2}, "by no pool"),
        ("autoscale", {"max": 3, "min": 1}, "by no pool"),
    ],
)
def test_a_limit_that_does_not_apply_says_so_and_changes_nothing(
    rig: Rig, app: Celery, command: str, arguments: dict[str, Any], says: str
) -> None:
    pool = ask(rig, app, "stats")["pool"]
    [answer] = app.control.broadcast(command, arguments, [rig.worker.name], reply=True, timeout=WAIT_TIMEOUT, limit=1)
    assert says in answer[rig.worker.name]["ok"]
    assert ask(rig, app, "stats")["pool"] == pool
    assert rig.caller.ask(address())["error"] == 0


@pytest.mark.slow
def test_the_command_line_tells_which_limits_do_not_apply(rig: Rig) -> None:
    said = celery(rig, "control", "rate_limit", TASK, "1/h")
    assert "OK" in said
    assert "rate limits do not apply here" in said
    assert "time limits do not apply here" in celery(rig, "control", "time_limit", TASK, "1", "2")
    assert "by no pool" in celery(rig, "control", "pool_grow", "1")
    assert "by no pool" in celery(rig, "control", "pool_shrink", "1")


def test_the_command_line_inspects(rig: Rig) -> None:
    assert "OK" in celery(rig, "inspect", "active")


def test_a_request_can_be_made_on_the_command_line(rig: Rig) -> None:
    email = address()
    request_id = celery(rig, "call", TASK, "--kwargs", json.dumps({"email": email})).strip()
    assert rig.caller.reply(request_id) == {"email": email, "error": 0}


@pytest.mark.slow
def test_the_command_line_cancels_and_adds_a_consumer(rig: Rig) -> None:
    celery(rig, "control", "cancel_consumer", "verification")
    celery(rig, "control", "add_consumer", "verification")
    assert rig.caller.ask(address())["error"] == 0
