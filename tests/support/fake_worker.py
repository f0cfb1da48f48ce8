"""A fake worker: takes requests off the queue and answers as Celery's result backend does."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import redis

from producer.aio import AsyncVerificationClient
from producer.settings import Settings
from support.redis_server import RedisServer

NAME = "fake-worker"
PAUSE = 0.1  # seconds before an unreachable server is tried again
END = "fake-worker-ends"  # a list; a push on it wakes the fake worker for its end


@dataclass
class Taken:
    """One message that was taken off the queue."""

    request_id: str
    kwargs: dict[str, Any]
    headers: dict[str, Any]


@dataclass
class FakeWorker:
    """Answers every request with `error(kwargs)`, on a thread, until the end of `with`."""

    server: RedisServer
    error: Callable[[dict[str, Any]], int] = lambda _: 0
    before: Callable[[FakeWorker, Taken], None] = lambda _worker, _taken: None  # called before each answer
    publish: bool = True  # False: replies are only stored
    taken: list[Taken] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.broker, self.results = (self.server.client(number, client_name=NAME) for number in (1, 2))
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._end.set()
        with contextlib.suppress(redis.RedisError):
            self.broker.lpush(END, "")
        self._thread.join()
        with contextlib.suppress(redis.RedisError):
            self.broker.delete(END)
        self.broker.close()
        self.results.close()

    def _work(self) -> None:
        while not self._end.is_set():
            try:
                item = self.broker.brpop([END, "verification"], timeout=1)
                if item is not None and not self._end.is_set():
                    self._answer([read(raw) for raw in (item[1], *(self.broker.rpop("verification", 500) or []))])
            except redis.RedisError:
                self._end.wait(PAUSE)

    def _answer(self, all_taken: list[Taken]) -> None:
        with self.results.pipeline(transaction=False) as pipe:
            for taken in all_taken:
                self.taken.append(taken)
                self.before(self, taken)
                key = f"celery-task-meta-{taken.request_id}"
                result = {"email": taken.kwargs["email"], "error": self.error(taken.kwargs)}
                meta: dict[str, Any] = {"status": "SUCCESS", "result": result, "traceback": None, "children": []}
                payload = json.dumps({**meta, "date_done": "2026-11-24T12:00:00+00:00", "task_id": taken.request_id})
                pipe.set(key, payload, ex=3600)
                if self.publish:
                    pipe.publish(key, payload)
            pipe.execute()


def read(raw: bytes) -> Taken:
    """The content of a message."""
    message = json.loads(raw)
    return Taken(message["headers"]["id"], json.loads(base64.b64decode(message["body"]))[1], message["headers"])


def settings(server: RedisServer, **more: Any) -> Settings:
    """The settings of a client of this server, which waits long for a reply."""
    options: dict[str, Any] = {"reply_timeout": 60} | more
    return Settings(redis_url=server.url(), **options)


def connections(server: RedisServer) -> set[str]:
    """The ids of the server's connections, without this one and the fake worker's."""
    with server.client() as client:
        own = str(client.client_id())
        return {entry["id"] for entry in client.client_list() if entry["name"] != NAME} - {own}


def pending(client: AsyncVerificationClient) -> int:
    """How many messages and replies of the client are on their way."""
    here = client._on_loop
    return 0 if here is None else len(here.publisher._waiting) + len(here.replies._waiting)


def exit_child(true: Callable[[], bool]) -> None:
    """End a forked child at once, with status 0 only if `true()`."""
    status = 1
    try:
        status = 0 if true() else 1
    finally:
        os._exit(status)
