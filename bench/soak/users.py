"""The callers of a soak beside those that push to Redis: end users who check the code that they were mailed, callers
through the API, callers whose clock is wrong, and one that asks again after a reply of 1."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import json
import random
import subprocess
import sys
import threading
import time
from typing import Final

import grpc
import httpx
from support.api_process import ApiProcess
from support.caller import message
from support.process import LAUNCH, ROOT, own_environment

from bench.soak.callers import Callers, Pace
from bench.soak.ledger import Breach, Ledger, Record
from producer.aio import AsyncVerificationClient
from producer.contract import ErrorCode
from producer.settings import Settings

CHECKED: Final = 0.25  # share of the mails whose code is checked
AT_ONCE: Final = 0.5  # share of these that are checked at once
LATER: Final = (0.5, 8.0)  # seconds after the mail; for the others
GUESSED: Final = 0.1  # share of the checks before which there is a wrong one
AGAIN_AFTER: Final = (0.5, 4.0)  # seconds after a reply of 1 until the id is asked again
API_THREADS: Final = 3  # for HTTP, and as many for gRPC
API_TIMEOUT: Final = 60.0  # seconds
CLOCKS: Final = {"slow": -600.0, "fast": 600.0}  # seconds
_WRONG: Final = "000000000000"


class EndUsers:
    """Check some of the mailed codes: the right code works once."""

    def __init__(self, ledger: Ledger, settings: Settings, seed: int) -> None:
        self._ledger, self._settings = ledger, settings
        self._chance = random.Random(f"{seed} users")
        self._loop = asyncio.new_event_loop()
        self._client: AsyncVerificationClient | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="users", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    def start(self) -> None:
        """Begin."""
        self._thread.start()
        self._ledger.on_mail = self._got

    def _got(self, email: str, code: int) -> None:
        if not self._stopping and self._chance.random() < CHECKED:
            self._loop.call_soon_threadsafe(self._take, email, code)

    def _take(self, email: str, code: int) -> None:
        task = self._loop.create_task(self._check_twice(email, code))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _check_twice(self, email: str, code: int) -> None:
        chance = self._chance
        await asyncio.sleep(0 if chance.random() < AT_ONCE else chance.uniform(*LATER))
        if chance.random() < GUESSED and not email.startswith("popular."):
            await self._ask(email, _WRONG)
        await self.consume(email, code)
        await asyncio.sleep(chance.uniform(0, 2))
        self._ledger.checked(email, code, await self._ask(email, f"{code:012d}"), first=False)

    async def consume(self, email: str, code: int) -> None:
        """Check a code that nobody has checked so far, until Redis answers."""
        if not self._ledger.claim(email, code):
            return
        first = True
        while True:
            error = await self._ask(email, f"{code:012d}")
            self._ledger.checked(email, code, error, first=first)
            if error != ErrorCode.REDIS_ERR:
                return
            first = False  # it may have been consumed all the same
            await asyncio.sleep(1)

    def consume_now(self, email: str, code: int) -> None:
        """The same for another thread; returns when it is done, or still tried after a while."""
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self.consume(email, code), self._loop).result(5)

    async def _ask(self, email: str, code: str) -> int:
        if self._client is None:
            self._client = AsyncVerificationClient(self._settings)
        return int((await self._client.check(email, code)).error)

    def stop(self) -> None:
        """Check what was begun to be checked, and hang up."""
        self._stopping = True
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(90)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    async def _end(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=60)
        if self._client is not None:
            await self._client.close()


class ApiCallers:
    """Ask through the HTTP and the gRPC API of any API process that runs."""

    def __init__(self, callers: Callers, apis: dict[str, ApiProcess], seed: int, a_second: float) -> None:
        self._callers, self._apis = callers, apis
        self._seed, self._pause = seed, 2 * API_THREADS / a_second
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask_on, args=(number,), daemon=True) for number in range(2 * API_THREADS)
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ask no more; callers that wait for an answer get it first."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(API_TIMEOUT)

    def _ask_on(self, number: int) -> None:
        chance = random.Random(f"{self._seed} api {number}")
        pace = Pace(chance, self._pause)
        how = "HTTP API" if number % 2 else "gRPC API"
        while not self._stopping.wait(pace.seconds()):
            name = chance.choice(sorted(self._apis))
            api = self._apis[name]
            record = self._callers.ledger.asking(self._callers.address("api"), how)
            try:
                error = _by_http(api, record.email) if number % 2 else int(api.call(record.email, timeout=60).error)
            except (httpx.HTTPError, grpc.RpcError, ValueError, KeyError, RuntimeError, AttributeError) as exc:
                self._refused(record, name, how, exc)
            else:
                self._callers.answered(record, error)

    def _refused(self, record: Record, name: str, how: str, exc: Exception) -> None:
        ledger = self._callers.ledger
        if ledger.ordered(name, record.at):
            ledger.refused[how] += 1
        else:
            why = f"{type(exc).__name__}: {str(exc)[:200]}"
            ledger.violated(f"{name} had no order to end, and refused a request: {why}", record, breach=Breach.API)


def _by_http(api: ApiProcess, email: str) -> int:
    answer = api.http.post("/get_varifycode", json={"email": email})
    answer.raise_for_status()
    return int(answer.json()["error"])


class WrongClock:
    """Our client in a process whose clock is `seconds` fast (or slow, if negative)."""

    def __init__(self, callers: Callers, settings: dict[str, str], name: str, seconds: float, a_second: float) -> None:
        self._callers, self._name, self._pause = callers, name, 1 / a_second
        self._how = f"AsyncVerificationClient.request, clock {abs(seconds):.0f} s {name}"
        command = [sys.executable, "-I", "-S", "-c", LAUNCH, sys.executable, "-m", "bench.soak.clock", str(seconds)]
        self._stopping = threading.Event()
        self._asked: dict[str, Record] = {}
        # Started by the thread that lives longest, as the kernel ends it together with its thread.
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=own_environment(settings),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is for the soak, not for it
        )
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._ask, self._read)]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        assert self._process.stdin is not None
        pace = Pace(random.Random(self._name), self._pause)
        while not self._stopping.wait(pace.seconds()):
            record = self._callers.ledger.asking(self._callers.address(self._name), self._how)
            self._asked[record.email] = record
            self._process.stdin.write(f"{record.email}\n")
            self._process.stdin.flush()
        self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            self._callers.answered(self._asked.pop(answer["email"]), answer["error"])

    def stop(self) -> None:
        """Ask no more; callers that wait for an answer get it first."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(30)
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


class AskAgain:
    """Asks again, under the same id, whoever was answered 1: such a reply is not final."""

    def __init__(self, ledger: Ledger, callers: Callers, seed: int) -> None:
        self._ledger, self._callers = ledger, callers
        self._chance = random.Random(f"{seed} again")
        self._due: list[tuple[float, int, Record]] = []
        self._lock = threading.Lock()
        self._count = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="again", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._ledger.on_redis_err = self._take
        self._thread.start()

    def _take(self, record: Record) -> None:
        with self._lock:
            self._count += 1
            heapq.heappush(self._due, (time.monotonic() + self._chance.uniform(*AGAIN_AFTER), self._count, record))

    @property
    def waiting(self) -> int:
        """How many are still to be asked again."""
        return len(self._due)

    def _run(self) -> None:
        with self._callers.raw_client() as client:
            while not self._stopping.wait(0.02):
                while (record := self._next()) is not None:
                    if self._ledger.ask_again(record) and record.request_id is not None:
                        envelope = message({"email": record.email}, request_id=record.request_id)
                        self._callers.push_envelopes(client, record, envelope)

    def _next(self) -> Record | None:
        with self._lock:
            due = self._due and self._due[0][0] <= time.monotonic() and not self._stopping.is_set()
            return heapq.heappop(self._due)[2] if due else None

    def stop(self) -> None:
        """Ask no more."""
        self._stopping.set()
        self._thread.join(90)
