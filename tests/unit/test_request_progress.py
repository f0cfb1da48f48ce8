"""The progress that the demo page gets, whatever clocks and events say."""

from __future__ import annotations

import asyncio
import json
import time
from base64 import b64encode
from typing import Any, cast

import pytest

from producer.api.demo import progress as progress_module
from producer.api.demo.progress import STAGES, Answer, RequestProgress
from producer.api.demo.task_events import OnEvent, TaskEvents, read_events
from producer.api.readiness import Finding, Readiness
from producer.store.backlog import Backlog

ID = "an-id"


class FakeTaskEvents:
    """Stands in for `TaskEvents`; a test calls `on_event` itself."""

    def __init__(self) -> None:
        self.on_event: OnEvent | None = None

    async def listen(self) -> None:
        pass

    def follow(self, request_id: str, on_event: OnEvent) -> None:
        assert request_id == ID
        self.on_event = on_event

    def forget(self, request_id: str) -> None:
        assert request_id in {ID, ""}
        self.on_event = None


class FakeReadiness:
    """Stands in for `Readiness`: this many workers at each look, the last number for good."""

    def __init__(self, *workers: int) -> None:
        self._workers = list(workers)

    async def find(self) -> Finding:
        workers = self._workers.pop(0) if len(self._workers) > 1 else self._workers[0]
        return Finding({}, Backlog(0, 0, 0, 0, workers, None))


def reported(*happens: tuple[str, float] | float | str, error: int = 0, workers: tuple[int, ...] = (1,)) -> list[Any]:
    """All lines when this happens: an event, seconds off our clock; a pause; `publish`, `confirmed`."""
    task_events = FakeTaskEvents()

    async def run() -> list[Any]:
        progress = RequestProgress(cast(TaskEvents, task_events), cast(Readiness, FakeReadiness(*workers)))

        async def ask() -> Answer:
            for each in happens:
                match each:
                    case float():
                        await asyncio.sleep(each)
                    case "publish":
                        progress.on_publish(ID)
                    case "confirmed":
                        progress.on_confirmed()
                    case (kind, offset):
                        assert task_events.on_event
                        task_events.on_event(str(kind), time.time() + float(offset))
            progress.answered()
            return {"error": error}

        return [line async for line in progress.lines(ask)]

    lines = asyncio.run(run())
    assert task_events.on_event is None
    return lines


def stages(lines: list[Any]) -> list[str]:
    return [line["stage"] for line in lines if "note" not in line]


@pytest.mark.parametrize("offset", [0.0, -3600.0, 3600.0])
def test_a_workers_clock_moves_no_time_back_or_into_the_future(offset: float) -> None:
    began = time.perf_counter()
    lines = reported("publish", "confirmed", ("task-received", offset), ("task-started", offset))
    elapsed = time.perf_counter() - began
    assert stages(lines) == list(STAGES)
    times = [line["at"] for line in lines]
    assert times == sorted(times)
    assert 0 <= times[-1] <= elapsed


def test_a_workers_event_before_the_confirmation_means_queued() -> None:
    assert stages(reported("publish", ("task-received", 0.0), ("task-started", 0.0), "confirmed")) == list(STAGES)


def test_without_events_the_reply_follows_the_queue() -> None:
    assert stages(reported("publish", "confirmed")) == ["api", "queue", "reply"]


def test_a_request_that_was_never_published_waits_for_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "GRACE", 3600.0)
    assert reported(error=3)[-1]["error"] == 3


def test_a_second_try_is_a_note_and_not_a_second_stage() -> None:
    tried = [("task-received", 0.0), ("task-started", 0.0), ("task-retried", 0.0)]
    lines = reported("publish", "confirmed", *tried, *tried, error=6)
    assert stages(lines) == list(STAGES)
    assert [line["stage"] for line in lines if line.get("note") == "again"] == ["relay", "relay"]


def test_missing_workers_are_noted_once_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "LOOK", 0.01)
    lines = reported("publish", "confirmed", 0.3, error=6, workers=(1, 0, 0, 1, 0, 0))
    notes = [(line["stage"], line["note"]) for line in lines if "note" in line]
    assert notes == [("queue", "no worker"), ("queue", "no worker")]


def packed(content: object) -> bytes:
    return json.dumps({"body": b64encode(json.dumps(content).encode()).decode()}).encode()


def test_events_are_read() -> None:
    event = {"type": "task-received", "uuid": ID, "timestamp": 1.0}
    assert read_events(packed([event, event])) == [event, event]
    assert read_events(packed(event)) == [event]


NO_EVENTS = [b"", b"\xff", b"7", b"[]", b"{}", b'{"body": 7}', b'{"body": "?"}', packed(7), packed([7]), b"[" * 99999]


@pytest.mark.parametrize("message", NO_EVENTS, ids=range(len(NO_EVENTS)))
def test_other_messages_hold_no_events(message: bytes) -> None:
    assert read_events(message) == []
