"""No address is shown whole, whatever characters its local part has: a worker's log, events, `inspect`, `dead`."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from support.caller import QUEUE, message
from support.process import eventually
from support.rig import Rig, operator_app
from support.smtp_server import Held, ScriptedServer
from typer.testing import CliRunner

from worker.cli import app as cli

ADDRESSES = [
    "o'secret@example.com",
    "x=secret@example.com",
    "{secret}@example.com",
    "!#$%&*+/?^_`|~-secret.{}='secret@example.com",
    "用secret户@例子.中国",
    '"a secret, \\" secret"@example.com',  # no valid address
]
VALID = ADDRESSES[:-1]


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """A rig whose relay takes any address."""
    with Rig(relay=ScriptedServer(offers=("PIPELINING", "8BITMIME", "SMTPUTF8"))) as rig:
        rig.add_worker()
        yield rig


@pytest.fixture(scope="module")
def app(rig: Rig) -> Iterator[Celery]:
    with operator_app(rig) as app:
        yield app


def inspected(rig: Rig, app: Celery, question: str, *args: Any) -> Any:
    return getattr(app.control.inspect([rig.worker.name], timeout=5, limit=1), question)(*args)[rig.worker.name]


def ids() -> list[str]:
    """Addresses as request ids, alone and in another text."""
    return [written.format(each) for each in ADDRESSES for written in ("{}", "id={}", "{{'to': '{}'}}")]


def test_logs_and_events_show_no_address_whole(rig: Rig) -> None:
    requests = [message({"email": each}, request_id=f"plain {each}") for each in ADDRESSES]
    requests += [message({"email": "anna@example.com", "purpose": each}, request_id=each) for each in ids()]
    errors = dict(
        zip([each["headers"]["id"] for each in requests], rig.caller.replies(rig.caller.push(*requests)), strict=True)
    )
    assert [errors[f"plain {each}"] for each in ADDRESSES] == [0] * len(VALID) + [3]
    # Celery itself runs what belongs to a group, and sends its own events.
    in_group = {"group": "several"}
    rig.caller.replies(
        rig.caller.push(*(message({"email": each}, request_id=f"group {each}", headers=in_group) for each in VALID))
    )
    eventually(
        lambda: len([each for each in rig.events() if "succeeded" in each["type"]]) >= len(requests) + len(VALID)
    )
    events = json.dumps(rig.events(), ensure_ascii=False)
    assert "***@example.com" in events
    assert "***@例子.中国" in events
    assert "secret" not in events
    assert "***@" in rig.worker.log
    assert "secret" not in rig.worker.log


def test_inspect_shows_no_address_whole(rig: Rig, app: Celery) -> None:
    hold = Held("250 ok")
    rig.relay.script["dot"] = hold
    # By the service, and by Celery.
    headers: list[dict[str, Any]] = [{}, {"group": "several"}]
    pushed = rig.caller.push(
        *(
            message({"email": each, "purpose": f"held-{number}"}, request_id=f"held {number} {each}", headers=header)
            for each in VALID
            for number, header in enumerate(headers)
        )
    )
    app.control.revoke([f"revoked {each}" for each in ADDRESSES], destination=[rig.worker.name], reply=True)
    asked = ("active", "reserved", "scheduled", "stats", "revoked")
    try:
        eventually(lambda: len(inspected(rig, app, "active")) == len(pushed))
        answers = json.dumps({each: inspected(rig, app, each) for each in asked}, ensure_ascii=False)
        answers += json.dumps(list(inspected(rig, app, "query_task", *pushed).values()), ensure_ascii=False)
        assert answers.count("***@example.com") >= 2 * len(pushed)
        assert "revoked o***@example.com" in answers
        assert "secret" not in answers
    finally:
        hold.release.set()
        del rig.relay.script["dot"]
    assert set(rig.caller.replies(pushed)) == {0}
    assert "secret" not in rig.worker.log
    assert "secret" not in json.dumps(rig.events(), ensure_ascii=False)


def test_dead_letters_show_no_address_whole(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in rig.settings.items():
        monkeypatch.setenv(name, value)
    for each in ids():
        told = {"argsrepr": each, "origin": each, each: [each]}
        arguments = {"email": each, "purpose": each}
        rig.caller.push(message(arguments, request_id=each, headers=told, content_type="text/plain"))
    rig.broker.lpush(QUEUE, json.dumps({"headers": {"id": ADDRESSES}, "body": ADDRESSES}), *ADDRESSES)
    count = len(ids()) + 1 + len(ADDRESSES)
    eventually(lambda: rig.broker.llen("verification.dead") == count)
    entry = {"reason": ADDRESSES[0], "code": ADDRESSES[1], "at": 1, "message": ADDRESSES[2]}
    cut = {"reason": "too large", "at": 1, "message": "{", "size": 70_000, "id": ADDRESSES[0]}
    rig.broker.lpush("verification.dead", json.dumps(entry), json.dumps(cut), *ADDRESSES)
    run = CliRunner().invoke
    listed = run(cli, ["dead", "list", "--json"])
    names = [json.loads(line)["name"] for line in listed.output.splitlines()]
    assert len(names) == count + 2 + len(ADDRESSES)
    said = [listed, *(run(cli, ["dead", *words]) for words in (["list"], ["show", *names], ["show", "--json", *names]))]
    for output in (each.output for each in said):
        assert "***@example.com" in output
        assert "secret" not in output
        assert base64.b64encode(b"secret").decode()[:-2] not in output
    assert "secret" not in rig.worker.log
