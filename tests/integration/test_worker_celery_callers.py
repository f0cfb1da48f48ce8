"""Callers with a Celery app of their own and its stock Redis transport."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery, chain, group
from celery.result import AsyncResult
from support.caller import TASK, address, message
from support.process import eventually, in_time
from support.rig import Rig


@pytest.fixture(scope="module")
def app(rig: Rig) -> Iterator[Celery]:
    """An ordinary app, configured from a dict: Celery would otherwise load the `celeryconfig.py` of this directory."""
    app = Celery("caller", set_as_current=False)
    app.config_from_object(
        {
            "broker_url": rig.url("broker"),
            "broker_transport": "kombu.transport.redis:Transport",
            "result_backend": rig.url("results"),
            "task_routes": {TASK: {"queue": "verification"}},
        }
    )
    yield app
    app.close()


def in_seconds(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def states(rig: Rig, request_id: str) -> list[str]:
    return [meta["status"] for meta in rig.caller.published(request_id)]


def test_send_task_and_get(rig: Rig, app: Celery) -> None:
    email = address()
    result = app.send_task(TASK, kwargs={"email": email})
    assert result.get(timeout=60) == {"email": email, "error": 0}
    assert result.state == "SUCCESS"
    assert states(rig, result.id) == ["SUCCESS"]
    assert len(rig.mails_to(email)) == 1


def test_send_task_with_positional_arguments(rig: Rig, app: Celery) -> None:
    email = address()
    assert app.send_task(TASK, args=[email, "login"]).get(timeout=60) == {"email": email, "error": 0}
    assert rig.codes.exists(f"code:login:{email}") == 1


def test_an_eta_in_the_future_delays_the_request(rig: Rig, app: Celery) -> None:
    email = address()
    due = in_seconds(1)
    result = app.send_task(TASK, kwargs={"email": email}, eta=due)
    assert result.get(timeout=60) == {"email": email, "error": 0}
    assert datetime.now(UTC) >= due
    assert len(rig.mails_to(email)) == 1
    assert states(rig, result.id) == ["SUCCESS"]


def test_far_off_etas_fill_no_workers_memory(rig: Rig, app: Celery) -> None:
    far = message({"email": address()}, headers={"eta": "2100-01-01T00:00:00"})
    rig.caller.push(*[far] * 2000)
    eventually(lambda: rig.held() == {"delayed": 2000, "delayed.due": 2000})
    assert rig.caller.ask(address())["error"] == 0
    assert app.control.inspect([rig.worker.name], timeout=5).scheduled() == {rig.worker.name: []}
    rig.broker.delete("verification.parked", "verification.parked.due")


def test_an_eta_under_another_requests_id_takes_nothing_from_it(rig: Rig) -> None:
    email = address()
    rig.script(email, rcpt=["450 4.2.0 later"])
    [request_id] = rig.caller.request_all(email)
    eventually(lambda: rig.broker.hexists("verification.parked", request_id))
    stranger = message({"email": address()}, request_id=request_id, headers={"eta": in_seconds(0.5).isoformat()})
    rig.caller.push(stranger)
    assert rig.caller.reply(request_id) == {"email": email, "error": 0}
    eventually(lambda: rig.broker.llen("verification.dead") == 1)
    rig.broker.delete("verification.dead")


def test_a_chain_with_an_eta_continues_with_the_reply(rig: Rig, app: Celery) -> None:
    email, queue = address(), f"other-{uuid.uuid4().hex}"
    link = app.signature("other.task", queue=queue)
    result = app.send_task(TASK, kwargs={"email": email}, link=link, eta=in_seconds(0.5))
    args, _kwargs, _embed = taken(rig, queue)
    assert args == [{"email": email, "error": 0}]
    assert result.get(timeout=60) == {"email": email, "error": 0}


def test_an_eta_in_the_past_delays_nothing(app: Celery) -> None:
    email = address()
    assert app.send_task(TASK, kwargs={"email": email}, eta=in_seconds(-60)).get(timeout=60)["error"] == 0


def test_an_expired_request_is_answered_6_unsent(rig: Rig, app: Celery) -> None:
    email = address()
    result = app.send_task(TASK, kwargs={"email": email}, expires=in_seconds(-1))
    assert result.get(timeout=60) == {"email": email, "error": 6}
    assert rig.mails_to(email) == []
    assert states(rig, result.id) == ["SUCCESS"]


def test_a_request_that_expires_later_is_sent(app: Celery) -> None:
    assert app.send_task(TASK, kwargs={"email": address()}, expires=60).get(timeout=60)["error"] == 0


def test_a_request_that_expires_before_its_eta_is_answered_6_unsent(rig: Rig, app: Celery) -> None:
    email = address()
    result = app.send_task(TASK, kwargs={"email": email}, eta=in_seconds(3600), expires=in_seconds(0.3))
    assert result.get(timeout=60) == {"email": email, "error": 6}
    assert rig.mails_to(email) == []
    assert states(rig, result.id) == ["SUCCESS"]


def test_a_group_is_answered_as_one(rig: Rig, app: Celery) -> None:
    emails = [address() for _ in range(5)]
    result = group(app.signature(TASK, kwargs={"email": email}) for email in emails).apply_async()
    assert result.get(timeout=60) == [{"email": email, "error": 0} for email in emails]
    assert {len(rig.mails_to(email)) for email in emails} == {1}


def taken(rig: Rig, queue: str) -> list[Any]:
    """The body of the one message on another queue."""
    found = rig.broker.brpop([queue], timeout=60)
    assert found is not None
    assert rig.broker.exists(queue) == 0
    body: list[Any] = json.loads(base64.b64decode(json.loads(found[1])["body"]))
    return body


def test_a_chain_continues_with_the_reply_on_another_queue(rig: Rig, app: Celery) -> None:
    email, queue = address(), f"other-{uuid.uuid4().hex}"
    result = chain(
        app.signature(TASK, kwargs={"email": email}), app.signature("other.task", args=["more"], queue=queue)
    ).apply_async()
    args, _kwargs, _embed = taken(rig, queue)
    assert args == [{"email": email, "error": 0}, "more"]
    assert rig.caller.reply(result.parent.id) == {"email": email, "error": 0}
    assert states(rig, result.parent.id) == ["SUCCESS"]


def test_a_link_is_called_with_the_reply(rig: Rig, app: Celery) -> None:
    email, queue = address(), f"other-{uuid.uuid4().hex}"
    result = app.send_task(TASK, kwargs={"email": email}, link=app.signature("other.task", queue=queue))
    args, _kwargs, _embed = taken(rig, queue)
    assert args == [{"email": email, "error": 0}]
    assert result.get(timeout=60) == {"email": email, "error": 0}


def test_a_chord_is_called_with_all_replies(rig: Rig, app: Celery) -> None:
    emails, queue = [address() for _ in range(3)], f"other-{uuid.uuid4().hex}"
    header = [app.signature(TASK, kwargs={"email": email}) for email in emails]
    (group(header) | app.signature("other.task", queue=queue)).apply_async()
    args, _kwargs, _embed = taken(rig, queue)
    assert args == [[{"email": email, "error": 0} for email in emails]]


def test_a_request_with_a_callback_is_retried(rig: Rig, app: Celery) -> None:
    email, queue = address(), f"other-{uuid.uuid4().hex}"
    rig.script(email, rcpt=["450 4.2.0 later"])
    result = app.send_task(TASK, kwargs={"email": email}, link=app.signature("other.task", queue=queue))
    assert result.get(timeout=60) == {"email": email, "error": 0}
    args, _kwargs, _embed = taken(rig, queue)
    assert args == [{"email": email, "error": 0}]
    assert states(rig, result.id) == ["SUCCESS"]


def revoke(rig: Rig, app: Celery, request_id: str) -> None:
    app.control.revoke(request_id)
    inspect = app.control.inspect([rig.worker.name], timeout=1, limit=1)
    eventually(lambda: request_id in (inspect.revoked() or {}).get(rig.worker.name, []))


def test_a_request_revoked_before_it_is_taken_is_answered_6_unsent(rig: Rig, app: Celery) -> None:
    email, request_id = address(), str(uuid.uuid4())
    revoke(rig, app, request_id)
    result = app.send_task(TASK, kwargs={"email": email}, task_id=request_id)
    assert result.get(timeout=60) == {"email": email, "error": 6}
    assert rig.mails_to(email) == []
    assert states(rig, request_id) == ["SUCCESS"]


def test_a_request_revoked_before_its_eta_is_answered_6_unsent(rig: Rig, app: Celery) -> None:
    def revoked(seconds: float) -> tuple[str, AsyncResult[Any]] | None:
        email, due = address(), in_seconds(seconds)
        result = app.send_task(TASK, kwargs={"email": email}, eta=due)
        while not rig.broker.hlen("verification.parked"):
            if datetime.now(UTC) > due:
                return None
        revoke(rig, app, result.id)
        return (email, result) if datetime.now(UTC) < due else None

    email, result = in_time(revoked)
    assert result.get(timeout=60) == {"email": email, "error": 6}
    assert rig.mails_to(email) == []
    assert states(rig, result.id) == ["SUCCESS"]


def test_bad_input_with_an_eta_is_answered_3(rig: Rig, app: Celery) -> None:
    assert app.send_task(TASK, args=[5], eta=in_seconds(0.2)).get(timeout=60) == {"email": 5, "error": 3}
    [request_id] = rig.caller.push(message({}, headers={"eta": in_seconds(0.2).isoformat()}))
    assert rig.caller.reply(request_id) == {"email": None, "error": 3}


def test_an_eta_may_lack_a_zone_or_be_in_basic_format(rig: Rig) -> None:
    for eta in (f"{in_seconds(0.2):%Y-%m-%dT%H:%M:%S.%f}", f"{in_seconds(0.2):%Y%m%dT%H%M%S}"):
        [request_id] = rig.caller.push(message({"email": address()}, headers={"eta": eta}))
        assert rig.caller.reply(request_id)["error"] == 0


def test_a_failing_callback_does_not_lose_the_reply(rig: Rig) -> None:
    rig.tolerated.append("_dispatch_callbacks_and_chain")
    email = address()
    signature = {
        "task": "other.task",
        "args": [],
        "kwargs": {},
        "options": {"queue": ["no", "name"]},
        "immutable": False,
    }
    [request_id] = rig.caller.push(message({"email": email}, embed={"callbacks": [signature]}))
    assert rig.caller.reply(request_id) == {"email": email, "error": 0}
    rig.settled()
    assert len(rig.mails_to(email)) == 1
    assert states(rig, request_id) == ["SUCCESS"]
