"""The faults of a soak: which there are, when each begins, and how it is made. One seed, one schedule."""

from __future__ import annotations

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
from support.caller import QUEUE, message
from support.malformed import malformed_messages
from support.rig import Rig
from support.smtp_server import Act, Drop, Last, Mail, ScriptedServer, Silence, Slowly
from support.tcp_proxy import HOLE, MUTE, PASS, STALL, TRICKLE, TcpProxy
from support.worker_process import WorkerProcess

from bench.soak.callers import Callers
from bench.soak.ledger import Ledger, Scanner

WORKERS: Final = 3
MINUTE: Final = 60.0  # seconds
CALM: Final = 12.0  # seconds of each minute in which no fault begins, to measure how fast replies are
EVERY: Final = (1.0, 4.0)  # seconds between two faults
LINGERS: Final = 2.0  # seconds after Redis' return until a worker has surely written what it sent meanwhile
EXIT_WITHIN: Final = 15.0  # seconds after SIGTERM


@dataclass(frozen=True, slots=True)
class Kind:
    """A fault. `where`: its targets; `seconds`: how long it lasts; `doubts`: promise 3 permits a second mail."""

    name: str
    where: tuple[str, ...]
    seconds: tuple[float, float]
    doubts: bool
    weight: int = 2


_WORKERS = tuple(f"worker {i}" for i in range(WORKERS))
_BEHIND_PROXIES = _WORKERS[1:]  # the first one connects to Redis without a proxy
_RELAYS = ("relay 0", "relay 0", "relay 1", "relays 0 and 1")
KINDS: Final = (
    Kind("worker: kill -9", _WORKERS, (0.2, 2), True, 4),
    Kind("worker: SIGSTOP past its lease", _WORKERS, (4, 6), True),
    Kind("worker: SIGTERM", _WORKERS, (0, 0), False, 3),
    Kind("Redis: kill -9", ("Redis",), (0.2, 3), True, 3),
    Kind("Redis: SIGSTOP", ("Redis",), (1, 5), True),
    Kind("Redis: CLIENT KILL", ("Redis",), (0, 0), False, 3),
    Kind("network to Redis: reset", _BEHIND_PROXIES, (0, 0), False),
    Kind("network to Redis: stall", _BEHIND_PROXIES, (1, 4), True),
    Kind("network to Redis: half open", _BEHIND_PROXIES, (1, 4), True),
    Kind("network to Redis: half open, one way", _BEHIND_PROXIES, (1, 3), True),
    Kind("network to Redis: trickle", _BEHIND_PROXIES, (1, 4), True),
    Kind("network to relay: reset", _RELAYS, (0, 0), True),
    Kind("network to relay: stall", _RELAYS, (1, 6), True),
    Kind("network to relay: half open", _RELAYS, (1, 4), True),
    Kind("network to relay: trickle", _RELAYS, (1, 4), True),
    Kind("relay: down", _RELAYS, (1, 6), True),
    Kind("relay: 421", _RELAYS, (1, 5), False),
    Kind("relay: 451 at RCPT", _RELAYS, (1, 5), False),
    Kind("relay: 451 after the final dot", _RELAYS, (1, 5), False),
    Kind("relay: silent", _RELAYS, (1, 5), True),
    Kind("relay: hangs up at DATA", _RELAYS, (1, 3), False),
    # Text and final dot leave in one write, so the sender cannot know that the dot was not read.
    Kind("relay: hangs up in mid-DATA", _RELAYS, (1, 3), True, 1),
    Kind("relay: hangs up after the final dot", _RELAYS, (0.5, 2), True),
    Kind("relay: one byte a second", _RELAYS, (1, 4), True),
    Kind("malformed messages", ("queue",), (0, 0), False, 3),
    Kind("same id twice", ("queue",), (0, 0), False, 4),
    Kind("same id, another address", ("queue",), (0, 0), False, 3),
)
# Those of `make picture`: each long enough to be seen, with calm between them. Begin in seconds, fault, target,
# duration in seconds. The longer ones outlast the `for` of their alert.
_LONG: Final = (
    (25, "worker: kill -9", "worker 1", 10),
    (60, "relay: down", "relay 0", 25),
    (115, "relay: down", "relays 0 and 1", 75),
    (225, "Redis: kill -9", "Redis", 40),
    *((305, "worker: kill -9", name, 40) for name in _WORKERS),
    (390, "relay: 451 at RCPT", "relays 0 and 1", 20),
    (440, "relay: silent", "relay 0", 20),
    (485, "malformed messages", "queue", 0),
    (505, "Redis: SIGSTOP", "Redis", 8),
)
LONG_FAULTS_END: Final = 560.0  # seconds: after all of them, and calm
_BY_NAME: Final = {kind.name: kind for kind in KINDS}
_MODES: Final = {"stall": STALL, "half open": HOLE, "half open, one way": MUTE, "trickle": TRICKLE}
_SCRIPTS: Final[dict[str, dict[str, Act]]] = {
    "421": {"banner": Last("421 4.7.0 later"), "mail": Last("421 4.7.0 later")},
    "451 at RCPT": {"rcpt": "451 4.3.0 later"},
    "451 after the final dot": {"dot": "451 4.3.0 later"},
    "silent": {"banner": Silence(), "dot": Silence()},
    "hangs up at DATA": {"data": Drop()},
    "hangs up in mid-DATA": {"content": Drop()},
    "hangs up after the final dot": {"dot": Drop()},
    "one byte a second": {"mail": Slowly("250 2.1.0 ok", 1), "dot": Slowly("250 2.0.0 ok", 1)},
}


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """One fault of the schedule; `dice` seeds its own random choices."""

    at: float
    kind: str
    where: str
    seconds: float
    dice: int


def schedule(seed: int, seconds: float) -> list[PlannedFault]:
    """The faults of a run. The same seed gives the same faults; a longer run begins like a shorter one."""
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


def long_faults() -> list[PlannedFault]:
    """The faults of `make picture`."""
    return [PlannedFault(at, kind, where, seconds, number) for number, (at, kind, where, seconds) in enumerate(_LONG)]


class Unkept(list[Any]):
    """A list that stays empty: each item goes to a function instead, or nowhere."""

    def __init__(self, take: Callable[[Any], object] | None = None) -> None:
        super().__init__()
        self._take = take

    def append(self, item: Any) -> None:
        if self._take is not None:
            self._take(item)


class Relay(ScriptedServer):
    """An SMTP server that reports its mails to the ledger, and keeps none."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger
        self.dotted = Unkept(self._whole)
        self.mails = Unkept(ledger.accepted)
        self.commands = Unkept()

    def _whole(self, mail: Mail) -> None:
        # Called when the final dot has come, right before the reply is chosen.
        act = self.script.get("dot", "250")
        if not (isinstance(act, str) and act.startswith("4")):
            self._ledger.whole(mail)


class FaultRunner:
    """Makes the faults of a schedule. Those of one part come in order, on a thread of its own that lives to the end: a
    worker ends with the thread that started it."""

    def __init__(
        self,
        rig: Rig,
        ledger: Ledger,
        scanner: Scanner,
        callers: Callers,
        relays: list[tuple[Relay, TcpProxy]],
        logs: Path | None,
    ) -> None:
        self._rig, self._ledger, self._scanner, self._callers = rig, ledger, scanner, callers
        self._relays, self._logs = relays, logs
        self._proxies: dict[str, TcpProxy] = {}
        self.workers: dict[str, WorkerProcess] = {}
        self._read: dict[WorkerProcess, int] = {}
        self.done: Counter[str] = Counter()
        parts = (*_WORKERS, "Redis", "relays", "queue")
        self._threads = {part: ThreadPoolExecutor(1, part) for part in parts}
        self._queue = callers.raw_client()
        self._futures: list[Future[None]] = []
        self.binds: dict[str, str] = {}  # where a worker serves its metrics; else on any free port
        self.peak_rss = 0  # KiB
        self.started = 0

    # Workers

    def start_workers(self, proxies: list[TcpProxy]) -> None:
        """All of them; the first one without a proxy."""
        self._proxies = dict(zip(_BEHIND_PROXIES, proxies, strict=True))
        for future in [self._threads[name].submit(self._start, name) for name in _WORKERS]:
            future.result(60)

    def _start(self, name: str) -> None:
        proxy = self._proxies.get(name)
        url = proxy.url() if proxy else self._rig.server.url()
        bind = self.binds.get(name, self._rig.settings["VERIFY_METRICS_BIND"])
        settings = {**self._rig.settings, "VERIFY_REDIS_URL": url, "VERIFY_METRICS_BIND": bind}
        worker = WorkerProcess(settings, log_level="DEBUG")
        self.workers[name] = worker
        self._read[worker] = 0
        self.started += 1
        worker.start(wait=False)
        # It is not ready while Redis is unreachable, and that is no violation.
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and b" ready." not in worker.log_path.read_bytes():
            if not worker.alive:
                self._ledger.violated(f"{name} ended at its start:\n{worker.log[-3000:]}")
                return
            time.sleep(0.05)

    def _retire(self, name: str) -> None:
        """Read the rest of the log of a worker that has ended, and drop it."""
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
        """Read logs and memory, and check that every worker runs that should. Called now and then."""
        for name, worker in list(self.workers.items()):
            self._threads[name].submit(self._look_at, name, worker).result(60)

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

    def begin(self, fault: PlannedFault) -> None:
        """Begin a fault, after those that are still under way at the same part."""
        self._futures = [each for each in self._futures if not each.done()]
        part = "relays" if fault.where.startswith("relay") else fault.where
        self._futures.append(self._threads[part].submit(self._run, fault))

    def _run(self, fault: PlannedFault) -> None:
        kind = _BY_NAME[fault.kind]
        window = self._ledger.begin(kind.name, fault.where, doubts=kind.doubts)
        group, _, what = kind.name.partition(": ")
        try:
            self._do(fault, group, what)
            self.done[kind.name] += 1
        except Exception as exc:  # noqa: BLE001 - whatever it is, the soak goes on, and fails at its end
            self._ledger.violated(f"the fault {kind.name} could not be done: {exc!r}")
        finally:
            if group in {"Redis", "network to Redis"} and kind.doubts:
                time.sleep(LINGERS)
            self._ledger.end(window)

    def _do(self, fault: PlannedFault, group: str, what: str) -> None:
        match group:
            case "worker":
                self._worker(fault, what)
            case "Redis":
                self._redis(fault, what)
            case "network to Redis":
                self._network([self._proxies[fault.where]], fault, what)
            case "network to relay":
                self._network([proxy for _, proxy in self._chosen(fault)], fault, what)
            case "relay":
                self._relay(fault, what)
            case _:
                self._messages(fault)

    def _worker(self, fault: PlannedFault, what: str) -> None:
        worker = self.workers[fault.where]
        if not worker.alive:  # `look` reports it
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

    def _network(self, proxies: list[TcpProxy], fault: PlannedFault, what: str) -> None:
        for proxy in proxies:
            proxy.mode = _MODES.get(what, PASS)
        time.sleep(fault.seconds)
        for proxy in proxies:
            if what != STALL:  # a stall only delays; the others have lost data
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
            relay.script |= _SCRIPTS[what]
        time.sleep(fault.seconds)
        for relay, _ in chosen:
            for step in _SCRIPTS[what]:
                del relay.script[step]

    def _messages(self, fault: PlannedFault) -> None:
        chance = random.Random(fault.dice)
        count = chance.randint(1, 6)
        if fault.kind == "malformed messages":
            known = list(malformed_messages().values())
            self._push_malformed([chance.choice(known) for _ in range(count)])
        elif fault.kind == "same id twice":
            for _ in range(count):
                envelope = message({"email": self._callers.address("twice")})
                self._callers.push_raw(self._queue, envelope, *[envelope] * chance.randint(1, 3))
            # And ids that were answered long ago: the cooldown is over, and still there is no second mail.
            old = [record for record in self._ledger.some_answered(count, chance) if record.request_id]
            again = [message({"email": record.email}, request_id=record.request_id) for record in old]
            with contextlib.suppress(redis.RedisError):
                if again:
                    self._queue.lpush(QUEUE, *(json.dumps(each) for each in again))
        else:
            reused = [
                message({"email": self._callers.address("reused")}, request_id=record.request_id)
                for record in self._ledger.some_answered(count, chance)
            ]
            self._push_malformed([json.dumps(each).encode() for each in reused])

    def _push_malformed(self, messages: list[bytes]) -> None:
        """Push messages that must be dead-lettered; only once, as a second push would be a second dead letter."""
        if not messages:
            return
        try:
            self._queue.lpush(QUEUE, *messages)
        except redis.ConnectionError as exc:
            # Only a refused connection is certain; otherwise they may be on the queue.
            self._ledger.expect_dead(0, 0 if "refused" in str(exc) else len(messages))
        except redis.RedisError:
            self._ledger.expect_dead(0, len(messages))
        else:
            self._ledger.expect_dead(len(messages), len(messages))

    def wait(self) -> None:
        """Return when every fault has ended."""
        for future in self._futures:
            future.result(90)

    def close(self) -> None:
        """End the workers, and read the rest of their logs."""
        for name, worker in list(self.workers.items()):
            if worker.alive:
                worker.resume()
                worker.kill()
            self._retire(name)
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)
        self._queue.close()
