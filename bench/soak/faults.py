"""The faults of a soak: which there are, when each comes, and how it is done. One seed, one schedule."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import redis
from faults.test_poison import from_field
from support.caller import QUEUE, message
from support.rig import Rig
from support.smtp_server import Act, Drop, Last, Mail, ScriptedServer, Silence, Slowly
from support.tcp_proxy import HOLE, MUTE, PASS, STALL, TRICKLE, TcpProxy
from support.worker_process import WorkerProcess

from bench.soak.callers import Callers
from bench.soak.ledger import Ledger, Scanner

WORKERS: Final = 3
MINUTE: Final = 60.0  # seconds
CALM: Final = 12.0  # of each minute: no fault begins, to see how fast replies are then
EVERY: Final = (1.0, 4.0)  # seconds between two faults
LINGERS: Final = 2.0  # seconds after Redis' return until a worker has surely told it what it sent meanwhile
EXIT_WITHIN: Final = 15.0  # seconds after SIGTERM


@dataclass(frozen=True, slots=True)
class Kind:
    """A fault. `seconds`: how long it lasts, from and to; `doubts`: promise 3 names it; `where`: what it is done to."""

    name: str
    where: tuple[str, ...]
    seconds: tuple[float, float]
    doubts: bool
    weight: int = 2


_WORKERS = tuple(f"worker {i}" for i in range(WORKERS))
_BEHIND = _WORKERS[1:]  # the first one has no proxy before Redis
_RELAYS = ("relay 0", "relay 0", "relay 1", "relays 0 and 1")
KINDS: Final = (
    Kind("worker: kill -9", _WORKERS, (0.2, 2), True, 4),
    Kind("worker: SIGSTOP past its lease", _WORKERS, (4, 6), True),
    Kind("worker: SIGTERM", _WORKERS, (0, 0), False, 3),
    Kind("Redis: kill -9", ("Redis",), (0.2, 3), True, 3),
    Kind("Redis: SIGSTOP", ("Redis",), (1, 5), True),
    Kind("Redis: CLIENT KILL", ("Redis",), (0, 0), False, 3),
    Kind("way to Redis: reset", _BEHIND, (0, 0), False),
    Kind("way to Redis: stall", _BEHIND, (1, 4), True),
    Kind("way to Redis: half open", _BEHIND, (1, 4), True),
    Kind("way to Redis: half open, one way", _BEHIND, (1, 3), True),
    Kind("way to Redis: trickle", _BEHIND, (1, 4), True),
    Kind("way to relay: reset", _RELAYS, (0, 0), True),
    Kind("way to relay: stall", _RELAYS, (1, 6), True),
    Kind("way to relay: half open", _RELAYS, (1, 4), True),
    Kind("way to relay: trickle", _RELAYS, (1, 4), True),
    Kind("relay: down", _RELAYS, (1, 6), True),
    Kind("relay: 421", _RELAYS, (1, 5), False),
    Kind("relay: 451 at RCPT", _RELAYS, (1, 5), False),
    Kind("relay: 451 after the dot", _RELAYS, (1, 5), False),
    Kind("relay: silent", _RELAYS, (1, 5), True),
    Kind("relay: hangs up at DATA", _RELAYS, (1, 3), False),
    # Text and final dot leave in one write: who sent them cannot know that the dot was not read.
    Kind("relay: hangs up in mid-DATA", _RELAYS, (1, 3), True, 1),
    Kind("relay: hangs up after the dot", _RELAYS, (0.5, 2), True),
    Kind("relay: one byte a second", _RELAYS, (1, 4), True),
    Kind("poison", ("queue",), (0, 0), False, 3),
    Kind("same id twice", ("queue",), (0, 0), False, 4),
    Kind("same id, another address", ("queue",), (0, 0), False, 3),
)
_BY_NAME: Final = {kind.name: kind for kind in KINDS}
_MODES: Final = {"stall": STALL, "half open": HOLE, "half open, one way": MUTE, "trickle": TRICKLE}
_SCRIPTS: Final[dict[str, dict[str, Act]]] = {
    "421": {"banner": Last("421 4.7.0 later"), "mail": Last("421 4.7.0 later")},
    "451 at RCPT": {"rcpt": "451 4.3.0 later"},
    "451 after the dot": {"dot": "451 4.3.0 later"},
    "silent": {"banner": Silence(), "dot": Silence()},
    "hangs up at DATA": {"data": Drop()},
    "hangs up in mid-DATA": {"content": Drop()},
    "hangs up after the dot": {"dot": Drop()},
    "one byte a second": {"mail": Slowly("250 2.1.0 ok", 1), "dot": Slowly("250 2.0.0 ok", 1)},
}


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """One fault of the schedule; `dice` seeds what it draws when it comes."""

    at: float
    kind: str
    where: str
    seconds: float
    dice: int


def schedule(seed: int, seconds: float) -> list[PlannedFault]:
    """The same for the same seed, and for a longer run the same at its beginning."""
    chance = random.Random(seed)
    planned: list[PlannedFault] = []
    at = 3.0
    while True:
        at += chance.uniform(*EVERY)
        if at % MINUTE > MINUTE - CALM:
            at += MINUTE - at % MINUTE
        kind = chance.choices(KINDS, [kind.weight for kind in KINDS])[0]
        fault = PlannedFault(
            at, kind.name, chance.choice(kind.where), chance.uniform(*kind.seconds), chance.getrandbits(32)
        )
        if at > seconds:
            return planned
        planned.append(fault)


class _Unkept(list[Any]):
    """What a server would keep is told to someone instead, or to nobody."""

    def __init__(self, tell: Callable[[Any], object] | None = None) -> None:
        super().__init__()
        self._tell = tell

    def append(self, item: Any) -> None:
        if self._tell is not None:
            self._tell(item)


def unkept(tell: Callable[[Any], object]) -> list[Any]:
    """A list that stays empty."""
    return _Unkept(tell)


class Relay(ScriptedServer):
    """Tells the ledger of its mails, and keeps none."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger
        self._loop: asyncio.AbstractEventLoop | None = None
        self.dotted = _Unkept(self._whole)
        self.mails = _Unkept(ledger.accepted)
        self.commands = _Unkept()

    async def start(self, port: int = 0) -> None:
        """Listen."""
        self._loop = asyncio.get_running_loop()
        await super().start(port)

    def say(self, acts: dict[str, Act]) -> None:
        """From now on, play these acts too."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.script.update, acts)

    def unsay(self, acts: dict[str, Act]) -> None:
        """No more."""
        assert self._loop is not None
        for step in acts:
            self._loop.call_soon_threadsafe(self.script.pop, step, None)

    def _whole(self, mail: Mail) -> None:
        # Called as the final dot came, before the reply is chosen, with nothing in between.
        act = self.script.get("dot", "250")
        if not (isinstance(act, str) and act.startswith("4")):
            self._ledger.whole(mail)


class FaultRunner:
    """Plays a schedule. What is done to one part is done in its order, on a thread of its own that lives to the end:
    a worker ends with the thread that started it."""

    def __init__(
        self,
        stage: Rig,
        ledger: Ledger,
        scanner: Scanner,
        callers: Callers,
        relays: list[tuple[Relay, TcpProxy]],
        logs: Path | None,
    ) -> None:
        self._rig, self._ledger, self._scanner, self._askers = stage, ledger, scanner, callers
        self._relays, self._logs = relays, logs
        self._ways: dict[str, TcpProxy] = {}
        self.workers: dict[str, WorkerProcess] = {}
        self._read: dict[WorkerProcess, int] = {}
        self.done: Counter[str] = Counter()
        parts = (*_WORKERS, "Redis", "relays", "queue")
        self._hands = {part: ThreadPoolExecutor(1, part) for part in parts}
        self._queue = callers.raw_client()
        self._futures: list[Future[None]] = []
        self.binds: dict[str, str] = {}  # where a worker serves its metrics; else on any free port
        self.peak_rss = 0  # KiB
        self.started = 0

    # Workers

    def start_workers(self, ways: list[TcpProxy]) -> None:
        """All of them; the first one without a proxy."""
        self._ways = dict(zip(_BEHIND, ways, strict=True))
        for future in [self._hands[name].submit(self._start, name) for name in _WORKERS]:
            future.result(60)

    def _start(self, name: str) -> None:
        way = self._ways.get(name)
        url = f"redis://127.0.0.1:{way.port}" if way else self._rig.server.url()
        bind = self.binds.get(name, self._rig.settings["VERIFY_METRICS_BIND"])
        settings = {**self._rig.settings, "VERIFY_REDIS_URL": url, "VERIFY_METRICS_BIND": bind}
        worker = WorkerProcess(settings, log_level="DEBUG")
        self.workers[name] = worker
        self._read[worker] = 0
        self.started += 1
        worker.start(wait=False)
        # Not ready while Redis is away, and that is not its fault.
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and b" ready." not in worker.log_path.read_bytes():
            if not worker.alive:
                self._ledger.violated(f"{name} ended at its start:\n{worker.log[-3000:]}")
                return
            time.sleep(0.05)

    def _retire(self, name: str) -> None:
        """Read the rest of the log of a worker that ended, and forget it."""
        worker = self.workers.pop(name)
        self._look_through(worker, last=True)
        if self._logs is not None:
            target = self._logs / f"{time.monotonic() - self._ledger.began:07.1f}-{name.replace(' ', '')}.log"
            target.write_bytes(worker.log_path.read_bytes())
        del self._read[worker]
        worker.close()

    def _look_through(self, worker: WorkerProcess, *, last: bool = False) -> None:
        with worker.log_path.open("rb") as log:
            log.seek(self._read[worker])
            while text := log.read(2**20):
                if not (last and len(text) < 2**20):
                    text = text[: text.rfind(b"\n") + 1]  # whole lines
                if not text:
                    break
                self._scanner.scan(text, worker.name)
                self._read[worker] += len(text)
                log.seek(self._read[worker])

    def look(self) -> None:
        """At logs, memory, and whether all live that should. Called now and then."""
        for name, worker in list(self.workers.items()):
            self._hands[name].submit(self._look_at, name, worker).result(60)

    def _look_at(self, name: str, worker: WorkerProcess) -> None:
        if self.workers.get(name) is not worker:
            return
        if not worker.alive:
            self._ledger.violated(f"{name} ended by itself ({worker.process.returncode}):\n{worker.log[-3000:]}")
            self._retire(name)
            self._start(name)
            return
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{worker.process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    self.peak_rss = max(self.peak_rss, int(line.split()[1]))
        self._look_through(worker)

    # The schedule

    def play(self, fault: PlannedFault) -> None:
        """Begin a fault, behind those that are still under way at the same part."""
        self._futures = [each for each in self._futures if not each.done()]
        part = "relays" if fault.where.startswith("relay") else fault.where
        self._futures.append(self._hands[part].submit(self._play, fault))

    def _play(self, fault: PlannedFault) -> None:
        kind = _BY_NAME[fault.kind]
        window = self._ledger.begin(kind.name, fault.where, doubts=kind.doubts)
        group, _, what = kind.name.partition(": ")
        try:
            self._do(fault, group, what)
            self.done[kind.name] += 1
        except Exception as exc:  # noqa: BLE001 - whatever it is, the soak goes on, and does not pass
            self._ledger.violated(f"the fault {kind.name} could not be done: {exc!r}")
        finally:
            if group in {"Redis", "way to Redis"} and kind.doubts:
                time.sleep(LINGERS)
            self._ledger.end(window)

    def _do(self, fault: PlannedFault, group: str, what: str) -> None:
        match group:
            case "worker":
                self._worker(fault, what)
            case "Redis":
                self._redis(fault, what)
            case "way to Redis":
                self._way([self._ways[fault.where]], fault, what)
            case "way to relay":
                self._way([proxy for _, proxy in self._chosen(fault)], fault, what)
            case "relay":
                self._relay(fault, what)
            case _:
                self._messages(fault)

    def _worker(self, fault: PlannedFault, what: str) -> None:
        worker = self.workers[fault.where]
        if not worker.alive:  # `look` tells of it
            return
        if what.startswith("SIGSTOP"):
            worker.pause()
            time.sleep(fault.seconds)
            worker.resume()
            return
        if what == "SIGTERM":
            worker.terminate()
            try:
                worker.wait(EXIT_WITHIN + 0.5)
            except subprocess.TimeoutExpired:
                log = worker.log[-3000:]
                self._ledger.violated(f"{fault.where} was not gone {EXIT_WITHIN} s after SIGTERM:\n{log}")
                worker.kill()
        else:
            worker.kill()
        time.sleep(fault.seconds)
        self._retire(fault.where)
        self._start(fault.where)

    def _redis(self, fault: PlannedFault, what: str) -> None:
        server = self._rig.server
        if what == "kill -9":
            server.kill()
            time.sleep(fault.seconds)
            server.start()
        elif what == "SIGSTOP":
            server.pause()
            time.sleep(fault.seconds)
            server.resume()
        else:
            chance = random.Random(fault.dice)
            with contextlib.suppress(redis.RedisError), server.client() as client:
                clients = [each["id"] for each in client.client_list()]
                for each in chance.sample(clients, min(len(clients), chance.randint(1, 8))):
                    client.client_kill_filter(_id=each, skipme=True)

    def _way(self, proxies: list[TcpProxy], fault: PlannedFault, what: str) -> None:
        for proxy in proxies:
            proxy.mode = _MODES.get(what, PASS)
        time.sleep(fault.seconds)
        for proxy in proxies:
            if what != STALL:  # that one only comes late; the others have lost or cut what was said
                proxy.reset()
            proxy.mode = PASS

    def _chosen(self, fault: PlannedFault) -> list[tuple[Relay, TcpProxy]]:
        return [each for i, each in enumerate(self._relays) if str(i) in fault.where]

    def _relay(self, fault: PlannedFault, what: str) -> None:
        chosen = self._chosen(fault)
        if what == "down":
            for _, proxy in chosen:
                proxy.refuse()
            time.sleep(fault.seconds)
            for _, proxy in chosen:
                proxy.admit()
            return
        for relay, _ in chosen:
            relay.say(_SCRIPTS[what])
        time.sleep(fault.seconds)
        for relay, _ in chosen:
            relay.unsay(_SCRIPTS[what])

    def _messages(self, fault: PlannedFault) -> None:
        chance = random.Random(fault.dice)
        count = chance.randint(1, 6)
        if fault.kind == "poison":
            known = list(from_field().values())
            self._bury([chance.choice(known) for _ in range(count)])
        elif fault.kind == "same id twice":
            for _ in range(count):
                envelope = message({"email": self._askers.address("twice")})
                self._askers.push_raw(self._queue, envelope, *[envelope] * chance.randint(1, 3))
            # And ids that have long been answered: the cooldown is over, and there is still no second mail.
            old = [record for record in self._ledger.some_answered(count, chance) if record.request_id]
            again = [message({"email": record.email}, request_id=record.request_id) for record in old]
            with contextlib.suppress(redis.RedisError):
                if again:
                    self._queue.lpush(QUEUE, *(json.dumps(each) for each in again))
        else:
            stolen = [
                message({"email": self._askers.address("thief")}, request_id=record.request_id)
                for record in self._ledger.some_answered(count, chance)
            ]
            self._bury([json.dumps(each).encode() for each in stolen])

    def _bury(self, messages: list[bytes]) -> None:
        """Push what must end among the dead letters; once, as a second push would be a second letter."""
        if not messages:
            return
        try:
            self._queue.lpush(QUEUE, *messages)
        except redis.ConnectionError as exc:
            # Refused is certain; else they may be on the queue.
            self._ledger.expect_dead(0, 0 if "refused" in str(exc) else len(messages))
        except redis.RedisError:
            self._ledger.expect_dead(0, len(messages))
        else:
            self._ledger.expect_dead(len(messages), len(messages))

    def lift(self) -> None:
        """Let every fault end."""
        for future in self._futures:
            future.result(90)

    def close(self) -> None:
        """End the workers, and read what is left of their logs."""
        for name, worker in list(self.workers.items()):
            if worker.alive:
                worker.resume()
                worker.kill()
            self._retire(name)
        for hands in self._hands.values():
            hands.shutdown(wait=False, cancel_futures=True)
        self._queue.close()
