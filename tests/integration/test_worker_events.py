"""Our task events on a real Redis: the same that Celery's dispatcher publishes, and readable by Celery's receiver."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import redis as redis_py
from celery import Celery
from celery.events import EventDispatcher
from support.caller import Listener
from support.process import eventually
from support.redis_server import RedisServer
from support.rig import Rig

from producer.contract import TASK, ErrorCode, VerifyRequest
from producer.redis.connection import RedisConnection, RedisConnections
from worker.celery_side import events as events_module
from worker.celery_side.events import Events
from worker.databases import Database
from worker.job import Finished, Job

DATABASE = 3
# Fields that differ between two events of one kind.
NEVER_THE_SAME = {"clock", "timestamp", "runtime"}


@pytest.fixture
def app(redis_server: RedisServer, redis: redis_py.Redis) -> Iterator[Celery]:
    del redis  # empties the server
    app = Celery("monitor", set_as_current=False)
    app.config_from_object(
        {"broker_url": redis_server.url(DATABASE), "broker_transport": "kombu.transport.redis:Transport"}
    )
    yield app
    app.close()


@pytest.fixture
def dispatcher(app: Celery) -> Iterator[EventDispatcher]:
    """Celery's own, as a worker has it."""
    with app.connection_for_write() as connection:
        yield app.events.Dispatcher(connection, hostname="w@host", buffer_group=["task"])


@pytest.fixture
def published(redis_server: RedisServer) -> Iterator[Listener]:
    listener = Listener(redis_server.url(), "*")
    yield listener
    listener.close()


def job(request_id: str = "", email: str = "anna@example.com") -> Job:
    return Job(request_id or uuid.uuid4().hex, "tag", VerifyRequest(email), None, None)


def run(server: RedisServer, use: Callable[[Events, RedisConnection], Coroutine[Any, Any, None]]) -> None:
    """Run `use` with events over an open connection, as there is one while requests come in."""

    async def main() -> None:
        async with RedisConnections() as redis:
            connection = redis.connection(server.url(DATABASE))
            await connection.run([("PING",)])
            events = Events(Database(connection, DATABASE))
            await use(events, connection)
            await events.close()

    asyncio.run(main())


def body(data: bytes) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(base64.b64decode(json.loads(data)["body"], validate=True))
    return found


def answered(*jobs: Job, error: ErrorCode | None = ErrorCode.SUCCESS) -> Finished:
    return [(job, error) for job in jobs]


def test_events_are_published_as_celerys_dispatcher_does(
    redis_server: RedisServer, dispatcher: EventDispatcher, published: Listener
) -> None:
    first, second = job(), job(email="bob@example.com")

    async def use(events: Events, _: RedisConnection) -> None:
        events.attach(dispatcher)
        events.received([first, second])
        events.done([(first, ErrorCode.SUCCESS), (second, None)])

    run(redis_server, use)
    for each, kwargs in ((first, "{'email': 'a***@example.com'}"), (second, "{'email': 'b***@example.com'}")):
        known = {"uuid": each.request_id, "root_id": each.request_id, "name": TASK, "retries": 0}
        dispatcher.send("task-received", args="()", kwargs=kwargs, **known)
        dispatcher.send("task-started", uuid=each.request_id)
    result = "{'email': 'a***@example.com', 'error': 0}"
    dispatcher.send("task-succeeded", uuid=first.request_id, result=result, runtime=0.01)
    dispatcher.send("task-retried", uuid=second.request_id, exception="not yet answered")
    dispatcher.flush()

    eventually(lambda: len(published.heard) == 2)
    [(channel, ours), (their_channel, theirs)] = published.heard
    assert channel == their_channel == f"/{DATABASE}.celeryev/task.multi"
    envelope, their_envelope = json.loads(ours), json.loads(theirs)
    for each in (envelope, their_envelope):
        del each["body"]
        uuid.UUID(each["properties"].pop("delivery_tag"))
    assert envelope == their_envelope
    for mine, their in zip(body(ours), body(theirs), strict=True):
        assert mine.keys() == their.keys()
        assert {name: type(value) for name, value in mine.items()} == {
            name: type(value) for name, value in their.items()
        }
        assert [name for name in mine if mine[name] != their[name] and name not in NEVER_THE_SAME] == []
        assert abs(mine["timestamp"] - time.time()) < 60
    clocks = [event["clock"] for event in body(ours) + body(theirs)]
    assert clocks == list(range(1, 13))


def test_celerys_receiver_reads_our_events(redis_server: RedisServer, app: Celery, dispatcher: EventDispatcher) -> None:
    task = job()
    read: list[dict[str, Any]] = []
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": read.append})
        thread = threading.Thread(target=receiver.capture, kwargs={"limit": 3, "timeout": 10, "wakeup": False})
        thread.start()
        with redis_server.client(DATABASE) as client:
            eventually(lambda: client.pubsub_numpat() + len(client.pubsub_channels("*celeryev*")))

        async def use(events: Events, _: RedisConnection) -> None:
            events.attach(dispatcher)
            events.received([task])
            events.done(answered(task, error=ErrorCode.TIMEOUT))

        run(redis_server, use)
        thread.join(60)
    assert [event["type"] for event in read] == ["task-received", "task-started", "task-succeeded"]
    state = app.events.State()
    for event in read:
        state.event(event)
    [(name, found)] = state.tasks_by_timestamp()
    assert name == found.uuid == found.root_id == task.request_id
    assert (found.state, found.name, found.worker.hostname) == ("SUCCESS", TASK, "w@host")
    assert found.result == "{'email': 'a***@example.com', 'error': 6}"


def test_many_events_are_published_at_once_and_few_after_a_delay(
    redis_server: RedisServer, dispatcher: EventDispatcher, published: Listener
) -> None:
    async def use(events: Events, _: RedisConnection) -> None:
        events.attach(dispatcher)
        events.received([job() for _ in range(events_module.FLUSH_AT // 2)])
        await asyncio.to_thread(eventually, lambda: len(published.heard) == 1)
        events.received([job()])
        events.done(answered(job()))
        await asyncio.to_thread(eventually, lambda: len(published.heard) == 2)

    run(redis_server, use)
    assert [len(body(data)) for _, data in published.heard] == [events_module.FLUSH_AT, 3]


def test_no_events_are_published_while_disabled(
    redis_server: RedisServer, dispatcher: EventDispatcher, published: Listener
) -> None:
    said: list[str] = []

    async def use(events: Events, _: RedisConnection) -> None:
        def send(name: str) -> None:
            said.append(name)
            events.received([job(name)])
            events.done(answered(job(name)))

        send("before Celery is there")
        events.attach(dispatcher)
        dispatcher.groups = {"worker"}
        send("as worker_send_task_events = False, and as after control disable_events")
        dispatcher.groups.add("task")
        send("heard 1")
        dispatcher.disable()
        send("while Celery connects anew")
        dispatcher.enable()
        send("heard 2")
        events.attach(None)
        send("without a dispatcher")
        events.attach(dispatcher)
        events.done([(job(), None), (Job("", "tag", VerifyRequest(None), None, None), None)])

    run(redis_server, use)
    eventually(lambda: published.heard)
    [(_, data)] = published.heard
    assert len(said) == 6
    events = body(data)
    assert [event["uuid"] for event in events[:-1]] == ["heard 1"] * 3 + ["heard 2"] * 3
    assert events[-1]["type"] == "task-retried"  # of two: what could not be read has no id


def test_a_dead_letter_is_a_rejected_task_and_no_event_has_an_address(
    redis_server: RedisServer, dispatcher: EventDispatcher, published: Listener
) -> None:
    secret = job("secret@example.com", "secret@example.com")
    secret.dead_lettered = True

    async def use(events: Events, _: RedisConnection) -> None:
        events.attach(dispatcher)
        events.received([secret])
        events.done(answered(secret, error=None))
        events.done(answered(secret))

    run(redis_server, use)
    eventually(lambda: published.heard)
    [(_, data)] = published.heard
    assert [event["type"] for event in body(data)] == [
        "task-received",
        "task-started",
        "task-rejected",
        "task-succeeded",
    ]
    assert {event["uuid"] for event in body(data)} == {"s***@example.com"}
    assert "secret" not in json.dumps(body(data))


def test_without_redis_events_are_dropped(
    new_redis_server: Callable[..., RedisServer], dispatcher: EventDispatcher
) -> None:
    server = new_redis_server()

    async def use(events: Events, link: RedisConnection) -> None:
        events.attach(dispatcher)
        server.kill()
        await asyncio.to_thread(eventually, lambda: not link.connected)
        for _ in range(100):
            events.received([job() for _ in range(events_module.FLUSH_AT // 4)])
        assert len(events._collected) < events_module.FLUSH_AT
        await asyncio.sleep(2 * events_module.MAX_DELAY)
        assert events._collected == []
        assert not link.connected

    run(server, use)


def test_events_resume_after_a_redis_restart(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig()
    rig.add_worker()
    rig.server.kill()
    rig.server.start()

    def request_has_events() -> bool:
        request_id = rig.caller.request(f"{uuid.uuid4().hex}@example.com")
        rig.caller.reply(request_id)
        time.sleep(2 * events_module.MAX_DELAY)
        return any(event["uuid"] == request_id for event in rig.events())

    eventually(request_has_events)
