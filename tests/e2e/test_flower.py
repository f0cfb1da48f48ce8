"""Flower, a worker and a relay, all real: what Flower shows, and that neither its pages nor its log show too much."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

import pytest
from celery import Celery, group
from support.caller import TASK, address, message
from support.flower_process import FlowerProcess
from support.process import eventually
from support.redis_server import RedisServer
from support.rig import Rig, code_in
from support.smtp_server import Drop, Held, ScriptedServer

HUSH = "hush-hush"  # all passwords


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """As the common one, with passwords, and sends that may take a minute."""
    relay = ScriptedServer(offers=("PIPELINING", "8BITMIME", "SMTPUTF8", "AUTH PLAIN"))
    with (
        RedisServer(password=HUSH) as server,
        Rig(server=server, relay=relay, send_timeout=60, relay_connections=32) as rig,
    ):
        rig.settings["VERIFY_RELAYS"] = f"smtp://anna:{HUSH}@127.0.0.1:{relay.port}"
        rig.add_worker()
        yield rig


@pytest.fixture(scope="module")
def flower(rig: Rig) -> Iterator[FlowerProcess]:
    with FlowerProcess(rig.worker.environment) as flower:
        # Flower asks the workers when it starts.
        asked = {"stats", "active_queues", "registered", "conf"}
        eventually(lambda: flower.api("/api/workers").get(rig.worker.name, {}).keys() >= asked)
        yield flower


def state_of(flower: FlowerProcess, request_id: str) -> str | None:
    state: str | None = flower.api("/api/tasks").get(request_id, {}).get("state")
    return state


def seen(flower: FlowerProcess, request_id: str, state: str = "SUCCESS") -> dict[str, Any]:
    """The task in Flower, once it is in this state."""
    eventually(lambda: state_of(flower, request_id) == state)
    task: dict[str, Any] = flower.api(f"/api/task/info/{request_id}")
    return task


def every_page(flower: FlowerProcess, worker: str) -> dict[str, str]:
    """All of Flower's pages and answers, by path."""
    flower.get(f"/api/workers?refresh=1&workername={worker}")  # inspects the worker again
    tasks = flower.api("/api/tasks")
    table = {"draw": 1, "start": 0, "length": 1000, "order[0][column]": 0, "order[0][dir]": "asc"}
    paths = [
        *("/", "/workers", "/workers?json=1", "/tasks", "/broker", f"/worker/{worker}", "/metrics", "/healthcheck"),
        f"/tasks/datatable?{urlencode({**table, 'columns[0][data]': 'name', 'search[value]': ''})}",
        f"/tasks/datatable?{urlencode({**table, 'columns[0][data]': 'name', 'search[value]': 'kwargs:secret'})}",
        *("/api/workers", "/api/workers?status=1", "/api/tasks", "/api/task/types", "/api/queues/length"),
        *(f"/{place}/{name}" for name in tasks for place in ("task", "api/task/info", "api/task/result")),
    ]
    return {path: flower.get(path) for path in paths}


def assert_private(rig: Rig, flower: FlowerProcess) -> None:
    """No page, no answer and no log has a code, a whole address, the body of a message or a password."""
    said = every_page(flower, rig.worker.name)
    said |= {"Flower's log": flower.log, "the worker's log": rig.worker.log}
    secrets = {code_in(mail) for mail in rig.relay.dotted} | {mail.recipient for mail in rig.relay.dotted}
    secrets |= {key.decode() for key in rig.codes.scan_iter("code*")}
    secrets |= {rig.codes.get(key).decode() for key in rig.codes.scan_iter("code*")}  # type: ignore[union-attr]
    secrets |= {str(each["body"]) for each in rig.caller.pushed}
    secrets |= {base64.b64encode(text.encode()).decode().rstrip("=") for text in secrets}
    secrets |= {json.dumps(text)[1:-1] for text in secrets} | {text.replace("@", "%40") for text in secrets}
    secrets |= {"secret-", HUSH}
    assert [(where, text) for where, page in said.items() for text in secrets if text in page] == []
    # Nor anything else that looks like an address.
    whole = {found for page in said.values() for found in re.findall(r"[\w.+-]+@[\w-]+\.\w+", page)}
    assert whole == set()


def test_flower_shows_workers_and_the_queue(rig: Rig, flower: FlowerProcess) -> None:
    info = flower.api("/api/workers")[rig.worker.name]
    assert [queue["name"] for queue in info["active_queues"]] == ["verification"]
    assert TASK in info["registered"]
    assert flower.api("/api/queues/length") == {"active_queues": [{"name": "verification", "messages": 0}]}
    eventually(lambda: rig.worker.name in flower.get("/workers"))  # from its heartbeats
    assert flower.get("/healthcheck") == "OK"


def test_the_columns_of_the_task_page_fit_into_1280_pixels(flower: FlowerProcess) -> None:
    # Looked at in Chromium: these five fit, and the id, which leads to the task's page, is cut off.
    columns = re.findall(r'data-column="(\w+)"', flower.get("/tasks"))
    assert columns == ["state", "result", "received", "runtime", "worker", "uuid"]


def test_a_request_is_a_task_with_state_arguments_result_and_runtime(rig: Rig, flower: FlowerProcess) -> None:
    email = address("secret-")
    request_id = rig.caller.request(email)
    assert rig.caller.reply(request_id) == {"email": email, "error": 0}
    task = seen(flower, request_id)
    assert task["name"] == TASK
    assert task["kwargs"] == "{'email': 's***@example.com'}"
    assert task["result"] == "{'email': 's***@example.com', 'error': 0}"
    assert task["runtime"] >= 0
    assert task["received"] <= task["started"] <= task["succeeded"]
    assert task["worker"] == rig.worker.name
    page = flower.get(f"/task/{request_id}")
    assert "s***@example.com" in page
    assert "SUCCESS" in page
    # Flower reads the caller's reply from the result backend, and masks its address.
    stored = flower.api(f"/api/task/result/{request_id}")
    assert stored["result"] == {"email": "s***@example.com", "error": 0}
    assert stored["state"] == "SUCCESS"


def test_every_outcome_is_shown(rig: Rig, flower: FlowerProcess) -> None:
    app = Celery("caller", set_as_current=False)
    app.config_from_object(
        {
            "broker_url": rig.url("broker"),
            "broker_transport": "kombu.transport.redis:Transport",
            "result_backend": rig.url("results"),
            "task_routes": {TASK: {"queue": "verification"}},
        }
    )
    refused, later, lost = (address("secret-") for _ in range(3))
    rig.script(refused, rcpt="550 5.1.1 no such user")
    rig.script(later, rcpt=["450 4.2.0 later"])
    rig.script(lost, dot=[Drop()])
    ids = [rig.caller.request(email) for email in (refused, later, lost, "secret-nobody")]
    ids += rig.caller.push(message(args=[address("secret-"), "login"], kwargs={}))
    assert rig.caller.replies(ids) == [5, 0, 0, 3, 0]
    eta = (datetime.now(UTC) + timedelta(seconds=0.5)).isoformat()
    # The representations of arguments that a caller sends are ignored.
    shown = {"argsrepr": "('secret-a@example.com',)", "kwargsrepr": "{'email': 'secret-a@example.com'}"}
    [waits] = rig.caller.push(message({"email": address("secret-")}, headers={"eta": eta, **shown}))
    expired = app.send_task(TASK, kwargs={"email": address("secret-")}, expires=datetime.now(UTC) - timedelta(hours=1))
    many = group(app.signature(TASK, kwargs={"email": address("secret-")}) for _ in range(3)).apply_async()
    odd = "o'secret-{x}=@example.com"
    headers: list[dict[str, Any]] = [{}, {"group": "odd"}]
    rig.caller.push(*(message({"email": odd}, request_id=f"{odd}{len(each)}", headers=each) for each in headers))
    revoked = message({"email": address("secret-")})
    app.control.revoke(revoked["headers"]["id"])
    eventually(lambda: revoked["headers"]["id"] in str(app.control.inspect([rig.worker.name]).revoked()))
    rig.caller.push(revoked)
    again = message({"email": address("secret-")}, request_id=ids[0])  # another address under a known id
    unknown = message({"email": address("secret-")}, headers={"task": "secret-task"})
    unfit = message({"email": address("secret-")}, body=base64.b64encode(b'["secret-b@example.com"').decode())
    rig.caller.push(again, unknown, unfit)

    assert "'error': 5" in seen(flower, ids[0])["result"]
    assert "'error': 0" in seen(flower, ids[1])["result"]
    assert seen(flower, ids[1])["retried"]
    assert "'error': 0" in seen(flower, ids[2])["result"]
    assert "'error': 3" in seen(flower, ids[3])["result"]
    assert "s***@example.com" in seen(flower, waits)["result"]
    assert "'error': 6" in seen(flower, expired.id)["result"]
    assert "'error': 6" in seen(flower, revoked["headers"]["id"])["result"]
    assert {"s***@example.com" in seen(flower, each.id)["result"] for each in many.results} == {True}
    eventually(lambda: rig.broker.llen("verification.dead") == 3)
    assert state_of(flower, ids[0]) == "SUCCESS"
    assert "" not in flower.api("/api/tasks")
    assert {task["name"] for task in flower.api("/api/tasks").values()} == {TASK}
    assert_private(rig, flower)
    app.close()


def test_a_delayed_request_is_in_retry(rig: Rig, flower: FlowerProcess) -> None:
    email, hold = address("secret-"), Held("250 ok")
    rig.script(email, dot=hold)
    first = rig.caller.request(email)
    assert hold.reached.wait(60)
    second = rig.caller.request(email)  # waits for the outcome of the first one's mail
    assert seen(flower, second, "RETRY")["kwargs"] == "{'email': 's***@example.com'}"
    assert state_of(flower, first) == "STARTED"
    hold.release.set()
    assert rig.caller.replies([first, second]) == [0, 0]
    assert seen(flower, second)["result"] == "{'email': 's***@example.com', 'error': 0}"


def test_requests_being_sent_are_active_and_others_queued(rig: Rig, flower: FlowerProcess) -> None:
    hold = Held("250 ok")
    emails = [address("secret-") for _ in range(50)]
    for email in emails:
        rig.script(email, dot=hold)
    ids = rig.caller.push(*(message({"email": email}) for email in emails))
    eventually(lambda: len(rig.relay.dotted) >= 32 and rig.broker.llen("verification") == 18)
    eventually(lambda: sum(state_of(flower, each) == "STARTED" for each in ids) == 32)

    assert flower.api("/api/queues/length") == {"active_queues": [{"name": "verification", "messages": 18}]}
    eventually(lambda: 'worker="%s"} 32.0' % rig.worker.name in flower.get("/metrics"))  # noqa: UP031 - braces
    info = flower.api(f"/api/workers?refresh=1&workername={rig.worker.name}")[rig.worker.name]
    assert len(info["active"]) == 32
    assert "s***@example.com" in str(info["active"])
    assert_private(rig, flower)

    hold.release.set()
    assert set(rig.caller.replies(ids)) == {0}
    eventually(lambda: {state_of(flower, each) for each in ids} == {"SUCCESS"})


def test_the_secret_of_flowers_cookies_is_not_in_its_log(flower: FlowerProcess) -> None:
    assert '"level": "debug"' in flower.log
    assert "cookie_secret" not in flower.log


def test_a_request_made_in_flower_is_masked_in_answer_and_log(rig: Rig, flower: FlowerProcess) -> None:
    email = address("secret-")
    answer = json.loads(flower.ask("POST", f"/api/task/apply/{TASK}", {"kwargs": {"email": email}}))
    assert answer["state"] == "SUCCESS"
    assert answer["result"] == {"email": "s***@example.com", "error": 0}
    assert len(rig.mails_to(email)) == 1
    assert email not in flower.log + rig.worker.log + flower.get(f"/api/task/result/{answer['task-id']}")
