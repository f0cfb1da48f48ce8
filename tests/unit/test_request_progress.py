"""What the demo page is told of a request, whatever clocks and events say."""

from __future__ import annotations

import asyncio
import json
import time
from base64 import b64encode
from typing import Any, cast

import pytest

from producer.api.demo import progress as journey_module
from producer.api.demo.progress import STATIONS, Answer, RequestProgress
from producer.api.demo.task_events import Hear, TaskEvents, read_events
from producer.api.readiness import Finding, Readiness
from producer.store.backlog import Backlog

ID = "an-id"


class Ears:
    """Stands in for `Hearing`."""

    def __init__(self) -> None:
        self.hear: Hear | None = None

    async def listen(self) -> None:
        pass

    def follow(self, request_id: str, hear: Hear) -> None:
        assert request_id == ID
        self.hear = hear

    def forget(self, request_id: str) -> None:
        assert request_id in {ID, ""}
        self.hear = None


class Eyes:
    """Stands in for `Probe`: so many workers at each look, the last number for good."""

    def __init__(self, *workers: int) -> None:
        self._workers = list(workers)

    async def find(self) -> Finding:
        workers = self._workers.pop(0) if len(self._workers) > 1 else self._workers[0]
        return Finding(True, True, True, Backlog(0, 0, 0, 0, workers, None))


def told(*happens: tuple[str, float] | float | str, error: int = 0, workers: tuple[int, ...] = (1,)) -> list[Any]:
    """All lines when this happens: an event, seconds off the door's clock; a pause; `asked`, `queued`."""
    ears = Ears()

    async def ask(progress: RequestProgress) -> Answer:
        for each in happens:
            match each:
                case float():
                    await asyncio.sleep(each)
                case "asked":
                    progress.on_publish(ID)
                case "queued":
                    progress.on_confirmed()
                case (kind, offset):
                    assert ears.hear
                    ears.hear(str(kind), time.time() + float(offset))
        progress.answered()
        return {"error": error}

    async def run() -> list[Any]:
        progress = RequestProgress(cast(TaskEvents, ears), cast(Readiness, Eyes(*workers)))
        return [line async for line in progress.lines(ask)]

    lines = asyncio.run(run())
    assert ears.hear is None
    return lines


def stations(lines: list[Any]) -> list[str]:
    return [line["station"] for line in lines if "note" not in line]


@pytest.mark.parametrize("offset", [0.0, -3600.0, 3600.0])
def test_a_workers_clock_moves_no_time_back_nor_beyond_now(offset: float) -> None:
    began = time.perf_counter()
    lines = told("asked", "queued", ("task-received", offset), ("task-started", offset))
    elapsed = time.perf_counter() - began
    assert stations(lines) == list(STATIONS)
    times = [line["at"] for line in lines]
    assert times == sorted(times)
    assert 0 <= times[-1] <= elapsed


def test_what_a_worker_says_before_redis_did_means_that_it_was_queued() -> None:
    assert stations(told("asked", ("task-received", 0.0), ("task-started", 0.0), "queued")) == list(STATIONS)


def test_without_events_the_reply_follows_the_queue() -> None:
    assert stations(told("asked", "queued")) == ["door", "queue", "reply"]


def test_a_request_that_was_never_asked_waits_for_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journey_module, "GRACE", 3600.0)
    assert told(error=3)[-1]["error"] == 3


def test_a_second_try_is_noted_and_not_a_second_visit() -> None:
    tried = [("task-received", 0.0), ("task-started", 0.0), ("task-retried", 0.0)]
    lines = told("asked", "queued", *tried, *tried, error=6)
    assert stations(lines) == list(STATIONS)
    assert [line["station"] for line in lines if line.get("note") == "again"] == ["relay", "relay"]


def test_missing_workers_are_noted_once_each_time_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journey_module, "LOOK", 0.01)
    lines = told("asked", "queued", 0.3, error=6, workers=(1, 0, 0, 1, 0, 0))
    notes = [(line["station"], line["note"]) for line in lines if "note" in line]
    assert notes == [("queue", "no worker"), ("queue", "no worker")]


def packed(content: object) -> bytes:
    return json.dumps({"body": b64encode(json.dumps(content).encode()).decode()}).encode()


def test_events_are_read() -> None:
    event = {"type": "task-received", "uuid": ID, "timestamp": 1.0}
    assert read_events(packed([event, event])) == [event, event]
    assert read_events(packed(event)) == [event]


NO_EVENTS = [b"", b"\xff", b"7", b"[]", b"{}", b'{"body": 7}', b'{"body": "?"}', packed(7), packed([7]), b"[" * 99999]


@pytest.mark.parametrize("message", NO_EVENTS, ids=range(len(NO_EVENTS)))
def test_what_is_no_event_is_nothing(message: bytes) -> None:
    assert read_events(message) == []
