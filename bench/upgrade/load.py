"""Steady load from callers of two releases: their clients, their APIs, and programs that push by themselves."""

from __future__ import annotations

import json
import random
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from support.api_process import ApiProcess
from support.caller import QUEUE, connect, message
from support.process import START_TIMEOUT

from bench.soak.callers import HOST
from bench.soak.faults import Relay
from bench.soak.ledger import Ledger, Record
from bench.upgrade.release import Release

# Shares of the load.
BY_CLIENT: Final = {"enqueue": 0.25, "request": 0.2, "blocking": 0.1}
BY_API: Final = {"HTTP": 0.15, "gRPC": 0.1}
RAW: Final = {"LPUSH": 0.12, "LPUSH with an ETA": 0.08}
ETA: Final = (2.0, 8.0)  # seconds from now
DEFERRED: Final = 0.3  # share of requests whose mail the relay defers
DEFERRALS: Final = 3  # of one mail, at most
POPULAR: Final = 0.1  # share of requests for addresses that many ask for
POPULAR_ADDRESSES: Final = 12
_WAITING: Final = 64  # callers of an API at one time


class Asker:
    """A process with the clients of one release."""

    def __init__(self, release: Release, settings: Mapping[str, str], ledger: Ledger) -> None:
        self._ledger = ledger
        self._name = release.name
        self._asked: dict[int, Record] = {}
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._process = subprocess.Popen(
            [release.python, "-P", Path(__file__).with_name("asker.py")],  # -P: nothing of ours gets on its path
            env=release.environment(settings),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for us; it ends with its standard input
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_until_ready(self) -> None:
        """Return when it reads requests."""
        if not self._ready.wait(START_TIMEOUT):
            raise TimeoutError(f"the client of {self._name} does not start")

    def ask(self, how: str, record: Record) -> None:
        """Make one request. What comes of it is recorded."""
        assert self._process.stdin is not None
        with self._lock:
            number = len(self._asked)
            self._asked[number] = record
            line = {"number": number, "how": how, "email": record.email, "id": record.request_id}
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            if "ready" in said:
                self._ready.set()
                continue
            record = self._asked[said["number"]]
            if "failed" in said:
                self._ledger.violated(f"a client of {self._name} failed with {said['failed']}", record)
            elif "answer" in said:
                record.answer = said["answer"]
            record.acknowledged = "failed" not in said and said.get("answer") != 1

    def close(self) -> None:
        """End it, once all that was asked is answered."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(START_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._ledger.violated(f"the clients of {self._name} do not end")
        finally:
            self.kill()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()
        self._reader.join(START_TIMEOUT)


class Load:
    """`a_second` requests in all, from the releases in `sides`, until `stop`."""

    def __init__(self, ledger: Ledger, relay: Relay, broker_url: str, *, seed: int, a_second: float) -> None:
        self.askers: dict[str, Asker] = {}
        self.apis: dict[str, ApiProcess] = {}
        self.sides: Sequence[str] = ()
        self._ledger, self._relay, self._broker = ledger, relay, connect(broker_url)
        self._chance, self._seed, self._pause = random.Random(seed), seed, 1 / a_second
        self._shares = BY_CLIENT | BY_API | RAW
        self._waiting = ThreadPoolExecutor(_WAITING, "caller")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, *, wait: bool) -> None:
        """Ask no more. `wait`: until those that wait for an API have its answer."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._waiting.shutdown(wait=wait, cancel_futures=not wait)
        self._broker.close()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopping.wait(max(0.0, due - time.monotonic())):
            due = max(due + self._pause, time.monotonic() - 1)  # it makes up for a second at most
            if self.sides:
                [how] = self._chance.choices(list(self._shares), list(self._shares.values()))
                self.ask(self._chance.choice(self.sides), how, self._address(how))

    def _address(self, how: str) -> str:
        chance = self._chance
        if how in {"enqueue", "LPUSH"} and chance.random() < POPULAR:
            return f"popular.{self._seed}.{chance.randrange(POPULAR_ADDRESSES)}@{HOST}"
        email = f"upgrade.{uuid.uuid4().hex[:10]}@{HOST}"
        if chance.random() < DEFERRED:
            deferrals = chance.randint(1, DEFERRALS)
            self._relay.scripts[email] = {"rcpt": ["451 4.3.0 later" for _ in range(deferrals)]}
        return email

    def ask(self, side: str, how: str, email: str) -> Record:
        """Make one request, and record it."""
        known = None if how in {"request", "blocking", *BY_API} else str(uuid.uuid4())
        who = how if how in RAW else f"{how}, {side}"
        record = self._ledger.asking(email, who, known)
        if how in BY_CLIENT:
            self.askers[side].ask(how, record)
        elif how in BY_API:
            api = self.apis[side]
            call = self._by_http if how == "HTTP" else self._by_grpc
            self._waiting.submit(self._answered, record, call, api)
        else:
            headers: dict[str, Any] = {}
            if how == "LPUSH with an ETA":
                headers["eta"] = (datetime.now(UTC) + timedelta(seconds=self._chance.uniform(*ETA))).isoformat()
            self._broker.lpush(QUEUE, json.dumps(message({"email": email}, request_id=known, headers=headers)))
            record.acknowledged = True
        return record

    def _answered(self, record: Record, call: Callable[[ApiProcess, str], int], api: ApiProcess) -> None:
        try:
            record.answer = call(api, record.email)
            record.acknowledged = record.answer != 1
        except Exception as exc:  # noqa: BLE001 - whatever it is, no caller of an API should see it
            self._ledger.violated(f"an API failed with {exc!r}", record)

    @staticmethod
    def _by_http(api: ApiProcess, email: str) -> int:
        return int(api.get_code(email)["error"])

    @staticmethod
    def _by_grpc(api: ApiProcess, email: str) -> int:
        return int(api.call(email).error)
