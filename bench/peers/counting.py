"""What a run left in Redis: as many of each as the relay took mails, or the run is void."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import redis

_STEP: Final = 5000  # keys or events of one look
_EVENTS: Final = "bull:verification:events"  # BullMQ's replies go there


class Counts(NamedTuple):
    """Of Successes."""

    codes: int
    marks: int
    replies: int


def counts(redis_url: str) -> Counts:
    """What a peer stored; it does nothing more meanwhile.

    Those that answer by gRPC store no replies (their caller counts them), and `old` no marks.
    """
    with redis.Redis.from_url(redis_url) as store:
        codes, marks = len(_keys(store, "code_*")), len(_keys(store, "sent:*"))
        replies = [json.loads(each) for each in _values(store, "reply:*")]
    with redis.Redis.from_url(redis_url, db=1) as broker:
        replies += [json.loads(each) for each in _returned(broker)]
    with redis.Redis.from_url(redis_url, db=2) as results:
        replies += [json.loads(each)["result"] for each in _values(results, "celery-task-meta-*")]
    return Counts(codes, marks, sum(reply["error"] == 0 for reply in replies))


def _keys(store: redis.Redis, pattern: str) -> list[bytes]:
    return list(set(store.scan_iter(pattern, count=_STEP)))  # SCAN may tell a key twice


def _values(store: redis.Redis, pattern: str) -> Iterator[bytes]:
    keys = _keys(store, pattern)
    for start in range(0, len(keys), _STEP):
        values: Any = store.mget(keys[start : start + _STEP])
        yield from values


def _returned(broker: redis.Redis) -> Iterator[bytes]:
    """What BullMQ's completed jobs returned, by its stream of events."""
    begin = "-"
    while True:
        events: Any = broker.xrange(_EVENTS, min=begin, count=_STEP)
        if not events:
            return
        yield from (event[b"returnvalue"] for _, event in events if event[b"event"] == b"completed")
        begin = f"({events[-1][0].decode()}"
