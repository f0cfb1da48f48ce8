"""The faults of a soak: which there are, when each begins, and how it is made. One seed, one schedule."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import redis
from support.api_process import ApiProcess
from support.caller import QUEUE, message
from support.malformed import malformed_messages
from support.process import START_TIMEOUT, Process
from support.redis_refusals import cut_connections, failed_save, full, replica, too_few_replicas
from support.redis_server import RedisServer
from support.rig import DATABASES, Calling, Rig, code_in
from support.smtp_server import Act, Drop, Last, Mail, ScriptedServer, Silence, Slowly
from support.tcp_proxy import HOLE, MUTE, PASS, STALL, TRICKLE, TcpProxy
from support.worker_process import STOP_WITHIN, WorkerProcess

from bench.soak.callers import Callers
from bench.soak.ledger import Breach, Ledger, Scanner

WORKERS: Final = 3
LEASE: Final = 5.0  # seconds that a worker may send without renewal: VERIFY_VISIBILITY_TIMEOUT
MINUTE: Final = 60.0  # seconds
CALM: Final = 12.0  # seconds of each minute in which no fault begins, to measure how fast replies are
EVERY: Final = (1.0, 4.0)  # seconds between two faults
LINGERS: Final = 2.0  # seconds after Redis' return until a worker has surely written what it sent meanwhile
EXIT_WITHIN: Final = STOP_WITHIN + 30.0  # seconds after SIGTERM: the promised ones, and room for a busy machine
READY_WITHIN: Final = START_TIMEOUT  # seconds for which a started process is waited for


@dataclass(frozen=True, slots=True)
class Kind:
    """A fault. `where`: its targets; `seconds`: how long it lasts; `doubts`: promise 3 permits a second mail."""

    name: str
    where: tuple[str, ...]
    seconds: tuple[float, float]
    doubts: bool
    weight: int = 2


_WORKERS = tuple(f"worker {i}" for i in range(WORKERS))
_APIS = ("api 0", "api 1")
STEADY: Final = ("worker 1", "api 0")  # never ended, so that their memory can be followed
_LINKED = (*_WORKERS, "api 0")  # cut off from Redis alone
_SERVER = ("Redis",)  # one of the servers, if there are several
_REFUSALS: Final = {"maxmemory": full, "MISCONF": failed_save, "READONLY": replica, "NOREPLICAS": too_few_replicas}
_RELAYS = ("relay 0", "relay 0", "relay 1", "relays 0 and 1")
KINDS: Final = (
    Kind("worker: kill -9", _WORKERS, (0.2, 2), True, 4),
    Kind("worker: SIGSTOP past its lease", _WORKERS, (LEASE + 1, LEASE + 3), True),
    Kind("worker: SIGTERM", _WORKERS, (0, 0), False, 3),
    Kind("Redis: kill -9", _SERVER, (0.2, 3), True, 3),
    Kind("Redis: SIGSTOP", _SERVER, (1, 5), True),
    Kind("Redis: CLIENT KILL", _SERVER, (0, 0), False, 3),
    Kind("network to Redis: reset", _LINKED, (0, 0), False),
    Kind("network to Redis: stall", _LINKED, (1, 4), True),
    Kind("network to Redis: half open", _LINKED, (1, 4), True),
    Kind("network to Redis: half open, one way", _LINKED, (1, 3), True),
    Kind("network to Redis: trickle", _LINKED, (1, 4), True),
    *(
        Kind(f"Redis refuses writes: {why}{cut}", _SERVER, (3, 10), True, 1)
        for why in _REFUSALS
        for cut in ("", ", connections cut")
    ),
    Kind("Redis, codes alone: cut off", ("all links",), (3, 8), True),
    Kind("worker cut off from Redis around its final dot: successor cut off", ("all links",), (0, 0), True),
    Kind("worker cut off from Redis around its final dot: successor killed", ("all links",), (0, 0), True),
    Kind("workers: rolling restart", ("workers",), (0, 0), False, 1),
    Kind("API: SIGTERM", ("api 1",), (0, 0), False, 2),
    Kind("API: kill -9", ("api 1",), (0.2, 2), False, 1),
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
_ENDS: Final = {"worker: kill -9", "worker: SIGTERM"}
_ONE_SERVER_LACKS: Final = {"Redis, codes alone: cut off"}
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


def _kind(name: str) -> str:
    """`worker` of `worker 1`."""
    return name.partition(" ")[0]


def server_names(servers: int) -> tuple[str, ...]:
    """The Redis servers of a run with one or three of them."""
    return _SERVER if servers == 1 else DATABASES


def schedule(seed: int, seconds: float, servers: int) -> list[PlannedFault]:
    """The faults of a run. The same seed gives the same faults; a longer run begins like a shorter one."""
    chance = random.Random(seed)
    kinds = [kind for kind in KINDS if servers > 1 or kind.name not in _ONE_SERVER_LACKS]
    weights = [kind.weight for kind in kinds]
    planned: list[PlannedFault] = []
    at = 3.0
    while True:
        at += chance.uniform(*EVERY)
        if at % MINUTE > MINUTE - CALM:
            at += MINUTE - at % MINUTE
        kind = chance.choices(kinds, weights)[0]
        where = server_names(servers) if kind.where == _SERVER else kind.where
        where = tuple(each for each in where if kind.name not in _ENDS or each not in STEADY)
        fault = PlannedFault(at, kind.name, chance.choice(where), chance.uniform(*kind.seconds), chance.getrandbits(32))
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
        self.commands = Unkept(lambda _line: self._last.pop(asyncio.current_task(), None))
        self._last: dict[asyncio.Task[Any] | None, Mail] = {}  # by connection: the mail that was the last thing on it
        self.watched: dict[str, Callable[[int], object]] = {}  # by recipient: what is told the code of its mails

    def _whole(self, mail: Mail) -> None:
        # Called when the final dot has come, right before the reply is chosen.
        act = self.scripts.get(mail.recipient, self.script).get("dot", "250")
        if not (isinstance(act, str) and act.startswith("4")):
            self._ledger.whole(mail)
        self._last[asyncio.current_task()] = mail
        if watch := self.watched.get(mail.recipient):
            watch(int(code_in(mail)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await super()._serve(reader, writer)
        if mail := self._last.pop(asyncio.current_task(), None):
            self._ledger.hung_up(mail)


class Link:
    """One process' connections to Redis: a proxy in front of each server. A fault holds the lock of what it breaks."""

    def __init__(self, servers: Mapping[str, RedisServer], stack: ExitStack) -> None:
        self.proxies = {name: stack.enter_context(TcpProxy(server.port)) for name, server in servers.items()}
        self.lock = threading.Lock()

    def settings(self) -> dict[str, str]:
        """The URLs of the three databases through the proxies."""
        if len(self.proxies) == 1:
            return {"VERIFY_REDIS_URL": self.proxies["Redis"].url()}
        urls = {which: self.proxies[which].url(number) for number, which in enumerate(DATABASES)}
        return {f"VERIFY_{which.upper()}_URL": url for which, url in urls.items()}

    def break_(self, mode: str, names: Iterable[str] | None = None) -> None:
        """Put the proxies, or those in front of these servers, into a mode."""
        for name in self.proxies if names is None else names:
            self.proxies[name].mode = mode

    def heal(self, *, reset: bool) -> None:
        """Let everything pass again. `reset`: end the open connections, whose data is lost in part."""
        for proxy in self.proxies.values():
            if proxy.mode != PASS and reset:
                proxy.reset()
            proxy.mode = PASS


class LostHolders:
    """Loses the holder of a request while its final dot is written or answered, and its successor at the next mail.

    Only one worker at a time reaches Redis until then, so that it is known which has the request. An end user may
    consume the code between.
    """

    def __init__(
        self, links: Mapping[str, Link], kill: Callable[[str], None] | None, chance: random.Random, email: str
    ) -> None:
        """`kill`: kills the successor, which is cut off otherwise."""
        self._links, self._kill, self.email = links, kill, email
        holder, successor, third = chance.sample(_WORKERS, 3)
        if successor in STEADY:  # it is never killed
            holder, successor = successor, holder
        self._holder, self._successor, self._third = holder, successor, third
        self._first, self._second = threading.Event(), threading.Event()
        self.mailed: list[int] = []  # codes
        self._consumes = chance.random() < 0.5
        again = Calling("250 2.0.0 ok", self._lose_successor)
        self.steps: dict[str, Act | list[Act]] = {"dot": [Calling("250 2.0.0 ok", self._lose_holder), again]}
        if chance.random() < 0.6:  # before the content instead: nothing that the worker writes to Redis then arrives
            self.steps = {"data": [Calling("354 go ahead", self._lose_holder)], "dot": ["250 2.0.0 ok", again]}

    def run(self, push: Callable[[], None], consume: Callable[[str, int], object]) -> None:
        """Push the request, and return when a third holder has had time to find it."""
        try:
            for name in (self._successor, self._third):
                self._links[name].break_(HOLE)
            push()
            if self._first.wait(10):
                time.sleep(0.5)
                if self.mailed and self._consumes:
                    consume(self.email, self.mailed[0])
                # What a lost holder had comes back after the visibility timeout, which is as long as the lease.
                if self._second.wait(2 * LEASE + 4):
                    time.sleep(2 * LEASE)
        finally:
            for name in _WORKERS:
                self._links[name].heal(reset=True)

    def _lose_holder(self) -> None:
        self._links[self._holder].break_(HOLE)
        self._links[self._successor].heal(reset=True)
        self._first.set()

    def _lose_successor(self) -> None:
        if self._kill is not None:
            self._kill(self._successor)
        else:
            self._links[self._successor].break_(HOLE)
        for name in (self._holder, self._third):
            self._links[name].heal(reset=True)
        self._second.set()


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
        servers: Mapping[str, RedisServer],
        logs: Path | None,
    ) -> None:
        """`servers`: by name; those of `server_names`."""
        self._rig, self._ledger, self._scanner, self._callers = rig, ledger, scanner, callers
        self._relays, self._servers, self._logs = relays, servers, logs
        self._links: dict[str, Link] = {}
        self.workers: dict[str, WorkerProcess] = {}
        self.apis: dict[str, ApiProcess] = {}
        self._read: dict[Process, int] = {}
        self._ordered: set[Process] = set()  # that were told to end
        self.done: Counter[str] = Counter()
        parts = (*_WORKERS, *_APIS, *servers, "relays", "queue", "all links", "workers")
        self._threads = {part: ThreadPoolExecutor(1, part) for part in parts}
        self._queue = callers.raw_client()
        self._futures: list[Future[None]] = []
        self._looks: dict[str, Future[None]] = {}
        self.binds: dict[str, str] = {}  # where a worker serves its metrics; else on any free port
        self.consume: Callable[[str, int], object] = lambda _email, _code: None  # an end user's check of a code
        self.started: Counter[str] = Counter()  # processes, by the first word of their names
        self.peak_rss: Counter[str] = Counter()  # KiB, likewise
        self.rss: dict[str, list[tuple[float, int]]] = {name: [] for name in STEADY}  # seconds since the start, KiB
        self.slowest_exit = 0.0  # seconds from a SIGTERM to the end

    # Processes

    def start_processes(self, stack: ExitStack, *, apis: bool) -> None:
        """All workers and, if wanted, the API processes, each through proxies of its own, which `stack` ends."""
        names = (*_WORKERS, *(_APIS if apis else ()))
        self._links = {name: Link(self._servers, stack) for name in names}
        for future in [self._threads[name].submit(self._start, name) for name in names]:
            future.result(2 * START_TIMEOUT)

    def _start(self, name: str) -> None:
        settings = {**self._rig.settings, **self._links[name].settings()}
        self.started[_kind(name)] += 1
        if name in _APIS:
            self._start_api(name, settings)
            return
        settings["VERIFY_METRICS_BIND"] = self.binds.get(name, self._rig.settings["VERIFY_METRICS_BIND"])
        process = WorkerProcess(settings, log_level="DEBUG")
        self._read[process] = 0
        self.workers[name] = process
        process.start(wait=False)
        # It is not ready while Redis is unreachable, and that is no violation.
        deadline = time.monotonic() + READY_WITHIN
        while time.monotonic() < deadline and b" ready." not in process.log_path.read_bytes():
            if not process.alive:
                return  # `look` reports it, unless it was told to
            time.sleep(0.1)

    def _start_api(self, name: str, settings: dict[str, str]) -> None:
        process = ApiProcess(settings)
        self._read[process] = 0
        try:
            process.start()
        except AssertionError:
            self._ended(name, process, "at its start")
        self.apis[name] = process

    def _ended(self, name: str, process: Process, when: str) -> None:
        breach = Breach.API if name in _APIS else Breach.WORKER
        code = process.process.returncode
        self._ledger.violated(f"{name} ended {when} by itself ({code}):\n{process.log[-3000:]}", breach=breach)

    def _retire(self, name: str) -> None:
        """Read the rest of the log of a process that has ended, and drop it."""
        process: Process = self.workers.pop(name) if name in self.workers else self.apis[name]
        self._look_through(process, last=True)
        if self._logs is not None:
            target = self._logs / f"{time.monotonic() - self._ledger.began:07.1f}-{name.replace(' ', '')}.log"
            target.write_bytes(process.log_path.read_bytes())
        del self._read[process]
        self._ordered.discard(process)
        process.close()

    def _look_through(self, process: Process, *, last: bool = False) -> None:
        with process.log_path.open("rb") as log:
            log.seek(self._read[process])
            while text := log.read(2**20):
                if not (last and len(text) < 2**20):
                    text = text[: text.rfind(b"\n") + 1]  # whole lines
                if not text:
                    break
                self._scanner.scan(text, process.log_path.stem)
                self._read[process] += len(text)
                log.seek(self._read[process])

    def look(self, within: float | None = None) -> None:
        """Read logs and memory, and check that every process runs that should. Called now and then.

        `within`: return when it is done, which takes at most so many seconds.
        """
        for name in (*self.workers, *self.apis):
            if name not in self._looks or self._looks[name].done():
                self._looks[name] = self._threads[name].submit(self._look_at, name)
        for look in list(self._looks.values()):
            if within is not None or look.done():
                look.result(within)

    def _look_at(self, name: str) -> None:
        process = self.workers.get(name) or self.apis.get(name)
        if process is None or process in self._ordered:
            return
        if not process.alive:
            self._ended(name, process, "under way")
            self._retire(name)
            self._start(name)
            return
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.process.pid}/status").read_text()
            peak, now = (int(found) for found in re.findall(r"^Vm(?:HWM|RSS):\s+(\d+)", status, re.MULTILINE))
            kind = _kind(name)
            self.peak_rss[kind] = max(self.peak_rss[kind], peak)
            if name in self.rss:
                self.rss[name].append((time.monotonic() - self._ledger.began, now))
        self._look_through(process)

    # The schedule

    def begin(self, fault: PlannedFault) -> None:
        """Begin a fault, after those that are still under way at the same part."""
        self._futures = [each for each in self._futures if not each.done()]
        part = "relays" if fault.where.startswith("relay") else fault.where
        self._futures.append(self._threads[part].submit(self._run, fault))

    def _run(self, fault: PlannedFault) -> None:
        kind = _BY_NAME[fault.kind]
        group, _, what = kind.name.partition(": ")
        with self._locked(group, fault.where):
            window = self._ledger.begin(kind.name, fault.where, doubts=kind.doubts and fault.where not in _APIS)
            try:
                self._do(fault, group, what)
                self.done[kind.name] += 1
            except Exception as exc:  # noqa: BLE001 - whatever it is, the soak goes on, and fails at its end
                self._ledger.violated(f"the fault {kind.name} could not be done: {exc!r}")
            finally:
                if "Redis" in group and kind.doubts:
                    time.sleep(LINGERS)
                self._ledger.end(window)

    @contextlib.contextmanager
    def _locked(self, group: str, where: str) -> Iterator[None]:
        """Hold the locks of the links that a fault breaks."""
        names = sorted(self._links) if where == "all links" else [where] if group == "network to Redis" else []
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(self._links[name].lock)
            yield

    def _do(self, fault: PlannedFault, group: str, what: str) -> None:
        match group:
            case "worker" | "API":
                self._end_one(fault, what)
            case "workers":
                self._restart_in_turn()
            case "Redis":
                self._redis(fault, what)
            case "Redis refuses writes":
                self._refuse_writes(fault, what)
            case "Redis, codes alone":
                self._cut_codes_off(fault)
            case "worker cut off from Redis around its final dot":
                self._cut_off_at_dot(fault, what)
            case "network to Redis":
                self._cut_link(self._links[fault.where], fault, what)
            case "network to relay":
                self._network([proxy for _, proxy in self._chosen(fault)], fault, what)
            case "relay":
                self._relay(fault, what)
            case _:
                self._messages(fault)

    def _end_one(self, fault: PlannedFault, what: str) -> None:
        process = self.workers.get(fault.where) or self.apis[fault.where]
        if what.startswith("SIGSTOP"):
            if process.alive:
                process.pause()
                time.sleep(fault.seconds)
                process.resume()
            return
        self._replace(fault.where, process, killed=what != "SIGTERM", away=fault.seconds)

    def _replace(self, name: str, process: Process, *, killed: bool = False, away: float = 0.0) -> None:
        """End a process and start another one; to be called on the thread of its name."""
        if (self.workers.get(name) or self.apis.get(name)) is not process:
            return
        if not process.alive and process not in self._ordered:  # `look` reports it
            return
        self._ordered.add(process)
        if killed:
            process.kill()
        elif process.alive:
            began = time.monotonic()
            process.terminate()
            try:
                process.wait(EXIT_WITHIN)
                self.slowest_exit = max(self.slowest_exit, time.monotonic() - began)
            except subprocess.TimeoutExpired:
                self._ledger.violated(f"{name} was not gone {EXIT_WITHIN} s after SIGTERM:\n{process.log[-3000:]}")
                process.kill()
        time.sleep(away)
        self._retire(name)
        self._start(name)

    def _restart_in_turn(self) -> None:
        """Restart one worker after the other, each when the one before is ready."""
        for name in _WORKERS:
            if name not in STEADY:
                self._threads[name].submit(self._restart, name).result(4 * START_TIMEOUT)

    def _restart(self, name: str) -> None:
        self._replace(name, self.workers[name])

    def _redis(self, fault: PlannedFault, what: str) -> None:
        server = self._servers[fault.where]
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

    def _refuse_writes(self, fault: PlannedFault, what: str) -> None:
        why, cut, _ = what.partition(", connections cut")
        with self._servers[fault.where].client(socket_timeout=30) as admin, _REFUSALS[why](admin):
            if cut:
                cut_connections(admin)
            time.sleep(fault.seconds)

    def _cut_codes_off(self, fault: PlannedFault) -> None:
        """No worker and no API reaches the codes; broker and results answer."""
        for link in self._links.values():
            link.break_(HOLE, ("codes",))
        time.sleep(fault.seconds)
        for link in self._links.values():
            link.heal(reset=True)

    def _cut_off_at_dot(self, fault: PlannedFault, what: str) -> None:
        """See `LostHolders`."""
        kill = self._kill if what == "successor killed" else None
        holders = LostHolders(self._links, kill, random.Random(fault.dice), self._callers.address("doubted"))
        for relay, _ in self._relays:
            relay.scripts[holders.email], relay.watched[holders.email] = holders.steps, holders.mailed.append
        try:
            envelope = message({"email": holders.email})
            holders.run(lambda: self._callers.push_raw(self._queue, envelope), self.consume)
        finally:
            for relay, _ in self._relays:
                relay.scripts.pop(holders.email, None)
                relay.watched.pop(holders.email, None)
            self._replace_killed()

    def _kill(self, name: str) -> None:
        worker = self.workers[name]
        if worker.alive and worker not in self._ordered:
            self._ordered.add(worker)
            worker.kill()

    def _replace_killed(self) -> None:
        for name, worker in list(self.workers.items()):
            if worker in self._ordered and not worker.alive:
                replace = partial(self._replace, name, worker, killed=True)
                self._futures.append(self._threads[name].submit(replace))

    def _cut_link(self, link: Link, fault: PlannedFault, what: str) -> None:
        if what == "reset":
            for proxy in link.proxies.values():
                proxy.reset()
            return
        link.break_(_MODES[what])
        time.sleep(fault.seconds)
        link.heal(reset=what != STALL)  # a stall only delays

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
            old = self._ledger.some_answered(count, chance)
            for record in old:
                self._ledger.reuse(record)
            reused = [
                message({"email": self._callers.address("reused")}, request_id=record.request_id) for record in old
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
        except redis.ResponseError:
            pass  # refused: none of them is on the queue
        except redis.RedisError:
            self._ledger.expect_dead(0, len(messages))
        else:
            self._ledger.expect_dead(len(messages), len(messages))

    def wait(self) -> None:
        """Return when every fault has ended."""
        while self._futures:
            self._futures.pop(0).result(600)

    def close(self) -> None:
        """End the processes, and read the rest of their logs."""
        for name, process in [*self.workers.items(), *self.apis.items()]:
            if process.alive:
                process.resume()
                process.kill()
            self._retire(name)
        self.apis.clear()
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)
        self._queue.close()
