"""A caller that shares no code with us: messages by hand, plain Redis commands, as contract.md has them."""

from __future__ import annotations

import base64
import itertools
import json
import time
import uuid
from types import TracebackType
from typing import Any, Final, Self

import redis

TASK: Final = "verification.send_code"
QUEUE: Final = "verification"
META: Final = "celery-task-meta-"


class Listener:
    """Keeps what is published on a channel pattern, in its order."""

    def __init__(self, where: str | redis.Redis, pattern: str) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self._client = redis.Redis.from_url(where) if isinstance(where, str) else where
        self._pubsub = self._client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
        self._pubsub.psubscribe(**{pattern: self._take})
        self._pubsub.get_message(timeout=5)  # the server's word that we are subscribed
        self._thread = self._pubsub.run_in_thread(sleep_time=0.05, daemon=True, exception_handler=self._again)

    def _take(self, message: dict[str, Any]) -> None:
        self.heard.append((message["channel"].decode(), message["data"]))

    def _again(self, *_: object) -> None:
        time.sleep(0.05)  # the server is away; redis-py connects and subscribes anew by itself

    def close(self) -> None:
        """Hear nothing more."""
        self._thread.stop()
        self._thread.join(5)
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
    """Pushes messages and awaits their replies, and keeps every state that is ever published."""

    def __init__(self, broker_url: str, results_url: str, *, queue: str = QUEUE) -> None:
        self.broker = redis.Redis.from_url(broker_url)
        self.results = redis.Redis.from_url(results_url)
        self.queue = queue
        self.pushed: list[dict[str, Any]] = []
        self._listener = Listener(results_url, f"{META}*")

    def push(self, *messages: dict[str, Any]) -> list[str]:
        """LPUSH them, in one command; their ids."""
        self.pushed += messages
        self.broker.lpush(self.queue, *(json.dumps(each) for each in messages))
        return [each["headers"]["id"] for each in messages]

    def request(self, email: Any, **kwargs: Any) -> str:
        """One request for a code; its id."""
        return self.push(message({"email": email, **kwargs}))[0]

    def reply(self, request_id: str, within: float = 10.0) -> dict[str, Any]:
        """The stored reply's result; every reply is a SUCCESS."""
        deadline = time.monotonic() + within
        while (stored := self.results.get(META + request_id)) is None:
            assert time.monotonic() < deadline, f"no reply within {within} s"
            time.sleep(0.005)
        meta = json.loads(stored)
        assert meta["status"] == "SUCCESS"
        result: dict[str, Any] = meta["result"]
        return result

    def replies(self, request_ids: list[str], within: float = 10.0) -> list[int]:
        """The errors of many."""
        deadline = time.monotonic() + within
        return [self.reply(each, max(0.0, deadline - time.monotonic()))["error"] for each in request_ids]

    def ask(self, email: Any, within: float = 10.0, **kwargs: Any) -> dict[str, Any]:
        """Request a code, and the reply's result."""
        return self.reply(self.request(email, **kwargs), within)

    def published(self, request_id: str | None = None) -> list[dict[str, Any]]:
        """All that was published until now under an id, or under any."""
        fence = META + str(uuid.uuid4())
        deadline = time.monotonic() + 10
        while fence not in {channel for channel, _ in self._listener.heard[-100:]}:
            assert time.monotonic() < deadline, "the subscription is broken"
            self.results.publish(fence, b"")
            time.sleep(0.01)
        return [
            json.loads(data)
            for channel, data in list(self._listener.heard)
            if data and (request_id is None or channel == META + request_id)
        ]

    def close(self) -> None:
        """Hang up."""
        self._listener.close()
        self.broker.close()
        self.results.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _exc: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.close()


_numbers = itertools.count(1)


def address(name: str = "user") -> str:
    """An address that no other test uses."""
    return f"{name}{next(_numbers)}@example.com"
