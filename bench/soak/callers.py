"""The callers of a soak that push to Redis themselves, at a steady rate: blocking client, asyncio client, raw LPUSH and
a stock Celery app."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, Final

import redis
from celery import Celery
from kombu.exceptions import OperationalError
from support.caller import QUEUE, TASK, message

from bench.soak.ledger import Ledger, Record
from producer.aio import AsyncVerificationClient
from producer.client import VerificationClient
from producer.errors import RedisUnavailable
from producer.settings import Settings
from worker.celery_side.redis_urls import celery_form, connect

HOST: Final = "soak.example"
POPULAR: Final = 12  # addresses that several callers ask for again and again
POPULAR_FOR: Final = 120.0  # seconds until other addresses take their place: well within the life of a code
AGAIN: Final = 0.2  # seconds between two attempts of one push
BEHIND: Final = 30.0  # seconds of waiting that a caller makes up for
_FAILED: Final = (redis.RedisError, RedisUnavailable, OperationalError, OSError)


class Pace:
    """One caller's rate: `pause` seconds between two requests on average. What it has missed it makes up for."""

    def __init__(self, chance: random.Random, pause: float) -> None:
        self._chance, self._pause = chance, pause
        self._next = time.monotonic()

    def seconds(self) -> float:
        """How long to wait until the next request."""
        now = time.monotonic()
        self._next = max(self._next + self._chance.uniform(0.5, 1.5) * self._pause, now - BEHIND)
        return max(0.0, self._next - now)


class Watch:
    """Notes when Redis has the request that a client's `request` pushes."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def on_publish(self, request_id: str) -> None:
        """Of no interest: most callers do not know the id."""

    def on_confirmed(self) -> None:
        """Redis has it."""
        self._record.acknowledged_at = time.monotonic()


class Callers:
    """`a_second` requests in all, until `stop`."""

    def __init__(self, ledger: Ledger, settings: Settings, seed: int, a_second: float) -> None:
        self.ledger, self._settings = ledger, settings
        self._seed = seed
        self._stopping = threading.Event()
        # threads (or tasks), share of the load, what one does
        self._pause = {name: count / (share * a_second) for name, (count, share) in SHARES.items()}
        self._threads = [
            *(threading.Thread(target=self._blocking, args=(i,), daemon=True) for i in range(SHARES["blocking"][0])),
            threading.Thread(target=lambda: asyncio.run(self._asynchronous()), daemon=True),
            threading.Thread(target=self._raw, daemon=True),
            threading.Thread(target=self._celery, daemon=True),
        ]
        self._client = VerificationClient(settings)
        self.slowest = 0.0

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ask no more; callers that wait for an answer get it first."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(30)

    def ask_last(self, records: list[Record]) -> None:
        """Ask for these, one after the other; then hang up."""
        with self._client:
            for record in records:
                record.at = time.monotonic()
                self.answered(record, self._client.request(record.email).error)

    def address(self, name: str) -> str:
        """An address that no other request has."""
        return f"{name}.{uuid.uuid4().hex[:10]}@{HOST}"

    def _some_address(self, chance: random.Random, name: str) -> str:
        """A new address, or a popular one."""
        if chance.random() < 0.7:
            return self.address(name)
        era = int((time.monotonic() - self.ledger.began) / POPULAR_FOR)
        return f"popular.{self._seed}.{era}.{chance.randrange(POPULAR)}@{HOST}"

    def _pace(self, chance: random.Random, name: str) -> Pace:
        return Pace(chance, self._pause[name])

    def _waits(self, pace: Pace) -> bool:
        return not self._stopping.wait(pace.seconds())

    def push_until_acknowledged(self, record: Record, push: Callable[[], object]) -> None:
        """Push under one id until Redis acknowledges it, for a minute at most."""
        until = time.monotonic() + 60
        while True:
            try:
                push()
            except _FAILED:
                if time.monotonic() > until:
                    return
                time.sleep(AGAIN)
            else:
                record.acknowledged, record.acknowledged_at = True, time.monotonic()
                return

    def answered(self, record: Record, error: int) -> None:
        """Record the answer that a waiting caller got."""
        self.slowest = max(self.slowest, time.monotonic() - record.at)
        record.answer = error
        # After error 1, Redis may have the request or not; it may have been asked again since.
        record.acknowledged = record.acknowledged or error != 1

    def _blocking(self, number: int) -> None:
        chance = random.Random(f"{self._seed} blocking {number}")
        client, pace = self._client, self._pace(chance, "blocking")
        while self._waits(pace):
            if chance.random() < 0.5:
                record = self.ledger.asking(self.address("blocking"), "VerificationClient.request")
                self.answered(record, client.request(record.email, observer=Watch(record)).error)
            else:
                known = str(uuid.uuid4())
                record = self.ledger.asking(self._some_address(chance, "enqueue"), "VerificationClient.enqueue", known)
                self.push_until_acknowledged(record, lambda r=record, i=known: client.enqueue(r.email, request_id=i))  # type: ignore[misc]  # bound at once

    async def _asynchronous(self) -> None:
        async with AsyncVerificationClient(self._settings) as client:
            tasks = [self._one_of_many(client, number) for number in range(SHARES["asyncio"][0])]
            await asyncio.gather(*tasks)

    async def _one_of_many(self, client: AsyncVerificationClient, number: int) -> None:
        chance = random.Random(f"{self._seed} asyncio {number}")
        pace = self._pace(chance, "asyncio")
        while not self._stopping.is_set():
            await asyncio.sleep(pace.seconds())
            record = self.ledger.asking(self.address("asyncio"), "AsyncVerificationClient.request")
            self.answered(record, (await client.request(record.email, observer=Watch(record))).error)

    def raw_client(self) -> redis.Redis:
        """A client of the broker database that never retries."""
        return connect(self._settings.broker_url, timeout=2)

    def _raw(self) -> None:
        chance = random.Random(f"{self._seed} raw")
        pace = self._pace(chance, "raw")
        with self.raw_client() as client:
            while self._waits(pace):
                envelope = message({"email": self._some_address(chance, "raw")})
                self.push_raw(client, envelope)

    def push_raw(self, client: redis.Redis, *envelopes: dict[str, Any]) -> None:
        """LPUSH messages of one request, in one command."""
        email = json.loads(base64.b64decode(envelopes[0]["body"]))[1]["email"]
        record = self.ledger.asking(email, "LPUSH", envelopes[0]["headers"]["id"])
        self.push_envelopes(client, record, *envelopes)

    def push_envelopes(self, client: redis.Redis, record: Record, *envelopes: dict[str, Any]) -> None:
        """LPUSH messages of a request that is recorded already, in one command."""
        self.push_until_acknowledged(record, lambda: client.lpush(QUEUE, *(json.dumps(each) for each in envelopes)))

    def _celery(self) -> None:
        chance = random.Random(f"{self._seed} celery")
        broker = celery_form(self._settings.broker_url, login=True)
        app = Celery("stock", broker=broker.url)
        sockets = {"socket_timeout": 2, "socket_connect_timeout": 1, "retry_on_timeout": False, **broker.options}
        app.conf.update(broker_transport_options=sockets, task_publish_retry=False, broker_connection_timeout=1)
        pace = self._pace(chance, "celery")
        while self._waits(pace):
            known = str(uuid.uuid4())
            record = self.ledger.asking(self._some_address(chance, "celery"), "Celery.send_task", known)
            self.push_until_acknowledged(record, lambda r=record, i=known: self._send_task(app, r.email, i))  # type: ignore[misc]  # bound at once

    @staticmethod
    def _send_task(app: Celery, email: str, request_id: str) -> None:
        # Nobody waits for the result here: the ledger listens to what is published.
        app.send_task(TASK, kwargs={"email": email}, task_id=request_id, queue=QUEUE, ignore_result=True)


# How many callers of each kind, and their share of the load.
SHARES: Final = {"blocking": (4, 0.3), "asyncio": (30, 0.35), "raw": (1, 0.2), "celery": (1, 0.15)}
