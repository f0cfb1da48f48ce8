"""A caller that shares no code with the product: messages written by hand and plain Redis commands, as any program
may use them."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any, Final, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from support.process import WAIT_TIMEOUT, eventually

TASK: Final = "verification.send_code"
QUEUE: Final = "verification"
META: Final = "celery-task-meta-"
_BATCH: Final = 1000  # messages of one LPUSH
_AWAY: Final = (redis.ConnectionError, redis.TimeoutError)


def address(name: str = "user") -> str:
    """An address that no other test uses."""
    return f"{name}.{uuid.uuid4().hex[:10]}@example.com"


def connect(where: str | redis.Redis) -> redis.Redis:
    """A client that never retries, so that a failure reaches the test; a client is taken as it is."""
    if isinstance(where, redis.Redis):
        return where
    return redis.Redis.from_url(where, socket_timeout=WAIT_TIMEOUT, retry=Retry(NoBackoff(), 0))


class Listener:
    """Keeps what is published on a channel pattern, in order."""

    def __init__(self, where: str | redis.Redis, pattern: str) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self._client = redis.Redis.from_url(where) if isinstance(where, str) else where
        self._pubsub = self._client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
        self._pubsub.psubscribe(**{pattern: self._take})
        self._pubsub.get_message(timeout=WAIT_TIMEOUT)  # the confirmation of the subscription
        self._thread = self._pubsub.run_in_thread(sleep_time=0.05, daemon=True, exception_handler=self._wait)

    def _take(self, message: dict[str, Any]) -> None:
        self.heard.append((message["channel"].decode(), message["data"]))

    def _wait(self, *_: object) -> None:
        time.sleep(0.05)  # the server is unreachable; redis-py connects and subscribes again by itself

    def close(self) -> None:
        """Stop listening."""
        self._thread.stop()
        self._thread.join(WAIT_TIMEOUT)
        self._client.close()


def message(
    kwargs: Any = None,
    *,
    request_id: str | None = None,
    args: Any = (),
    embed: Any = None,
    headers: dict[str, Any] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """The minimal message; `headers` are added to its own, `fields` (`content_type`) replace fields."""
    body = json.dumps([list(args), kwargs, {} if embed is None else embed])
    envelope: dict[str, Any] = {
        "body": base64.b64encode(body.encode()).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": TASK, "id": request_id or str(uuid.uuid4()), **(headers or {})},
        "properties": {
            "delivery_tag": str(uuid.uuid4()),
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
        },
    }
    return envelope | {name.replace("_", "-"): value for name, value in fields.items()}


class Caller:
    """Pushes messages, waits for their replies, and keeps every state that is published."""

    def __init__(self, broker: str | redis.Redis, results: str | redis.Redis, *, queue: str = QUEUE) -> None:
        self.broker, self.results = connect(broker), connect(results)
        self.queue = queue
        self.pushed: list[dict[str, Any]] = []  # the messages that Redis has acknowledged
        self.unsure: set[str] = set()  # ids of messages that may be queued, though Redis has not acknowledged them
        self.listener = Listener(results, f"{META}*")
        self._not_stored: dict[str, dict[str, Any]] = {}  # published replies of 1
        self._looked_at = 0  # how much of what was heard has been searched for them

    def push(self, *messages: dict[str, Any]) -> list[str]:
        """LPUSH them; their ids."""
        for start in range(0, len(messages), _BATCH):
            batch = messages[start : start + _BATCH]
            self.broker.lpush(self.queue, *(json.dumps(each) for each in batch))
            self.pushed += batch
        return [each["headers"]["id"] for each in messages]

    def push_despite_faults(self, envelope: dict[str, Any], gives_up: Callable[[], bool]) -> bool:
        """Push one message until Redis acknowledges it, or until `gives_up()`; whether it did."""
        while True:
            try:
                self.push(envelope)
            except redis.RedisError:
                if gives_up():
                    self.unsure.add(envelope["headers"]["id"])
                    return False
                time.sleep(0.05)
            else:
                return True

    def request(self, email: Any, **kwargs: Any) -> str:
        """Request a code; the request's id."""
        return self.push(message({"email": email, **kwargs}))[0]

    def request_all(self, *emails: Any, headers: dict[str, Any] | None = None) -> list[str]:
        """Request a code for each address; their ids."""
        return self.push(*(message({"email": email}, headers=headers) for email in emails))

    def stored(self, request_id: str) -> dict[str, Any] | None:
        """The stored reply, whole; None while there is none."""
        raw = self.results.get(META + request_id)
        return json.loads(raw) if raw is not None else None

    def answered(self, request_ids: Iterable[str]) -> int:
        """How many of these have a stored reply."""
        keys = [META + each for each in request_ids]
        return sum(value is not None for value in self.results.mget(keys)) if keys else 0

    def reply(self, request_id: str, within: float = WAIT_TIMEOUT) -> dict[str, Any]:
        """The result of the stored reply, or of one that was only published; Redis may be away meanwhile."""
        deadline = time.monotonic() + within
        while True:
            with contextlib.suppress(*_AWAY):
                if (meta := self.stored(request_id) or self._not_final(request_id)) is not None:
                    assert meta["status"] == "SUCCESS"
                    result: dict[str, Any] = meta["result"]
                    return result
            assert time.monotonic() < deadline, f"no reply within {within} s"
            time.sleep(0.005)

    def _not_final(self, request_id: str) -> dict[str, Any] | None:
        """The last reply of 1 that was published under an id: nothing stores it."""
        new = self.listener.heard[self._looked_at :]
        self._looked_at += len(new)
        for channel, data in new:
            meta = json.loads(data or b"{}")
            result = meta.get("result")  # another task's may be anything
            if isinstance(result, dict) and result.get("error") == 1:
                self._not_stored[channel.removeprefix(META)] = meta
        return self._not_stored.get(request_id)

    def replies(self, request_ids: Iterable[str], within: float = WAIT_TIMEOUT) -> list[int]:
        """The errors of many."""
        deadline = time.monotonic() + within
        return [self.reply(each, max(0.0, deadline - time.monotonic()))["error"] for each in request_ids]

    def ask(self, email: Any, within: float = WAIT_TIMEOUT, **kwargs: Any) -> dict[str, Any]:
        """Request a code; the reply's result."""
        return self.reply(self.request(email, **kwargs), within)

    def published(self, request_id: str | None = None) -> list[dict[str, Any]]:
        """All that has been published under an id, or under any."""
        end = META + str(uuid.uuid4())

        def reached() -> bool:
            self.results.publish(end, b"")
            return end in {channel for channel, _ in self.listener.heard[-100:]}

        eventually(reached)
        return [
            json.loads(data)
            for channel, data in list(self.listener.heard)
            if data and (request_id is None or channel == META + request_id)
        ]

    def close(self) -> None:
        """Hang up."""
        self.listener.close()
        self.broker.close()
        self.results.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Load:
    """Requests in the background, at most so many a second, whatever happens to Redis: `with Load(caller) as load:`."""

    def __init__(self, caller: Caller, *, a_second: float = 100) -> None:
        self._caller, self._pause = caller, 1 / a_second
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.ids: list[str] = []

    def _run(self) -> None:
        while not self._stop.is_set():
            envelope = message({"email": address("load")})
            if self._caller.push_despite_faults(envelope, self._stop.is_set):
                self.ids.append(envelope["headers"]["id"])
            time.sleep(self._pause)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(WAIT_TIMEOUT)
