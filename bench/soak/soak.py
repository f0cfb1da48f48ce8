"""The soak: steady load, a random fault every few seconds, every promise checked at the end, and a report of one page.

`make soak MINUTES=10 SEED=1`, or `.venv/bin/python -m bench.soak run --minutes 10 --seed 1`.
Each database has a server of its own; `--servers 1` puts all on one.
Ctrl-C ends the faults early and checks what was done until then; twice, it ends at once.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self

import redis
from support.caller import META
from support.rig import DATABASES, Rig, held_in, keys_without_ttl
from support.smtp_server import running
from support.tcp_proxy import TcpProxy

from bench.soak import installed
from bench.soak.callers import SHARES, Callers
from bench.soak.faults import (
    CALM,
    EVERY,
    LEASE,
    MINUTE,
    STEADY,
    WORKERS,
    FaultRunner,
    PlannedFault,
    Relay,
    Unkept,
    long_faults,
    schedule,
    server_names,
)
from bench.soak.ledger import KEPT, Breach, Ledger, Scanner
from bench.soak.recording import Recording
from bench.soak.users import CLOCKS, ApiCallers, AskAgain, EndUsers, WrongClock
from producer.contract import ErrorCode
from producer.settings import Settings
from worker.celery_side.redis_urls import connect

GIVE_UP_AFTER: Final = 60  # seconds
SETTLED: Final = GIVE_UP_AFTER + 120.0  # seconds after the last fault within which nothing may be left anywhere
BY_API: Final = 0.1  # share of the requests that go through the API
BY_WRONG_CLOCK: Final = 0.03  # and those of each caller whose clock is wrong
STALLED: Final = 1.0  # seconds for which nothing ran here: then leases may have run out
WARM_UP: Final = 600.0  # seconds before the memory of a process is followed; at most half of the run
PROGRESS: Final = 10.0  # seconds
LAST: Final = 30  # requests after the last fault, which must all succeed
LAST_WITHIN: Final = 60.0  # seconds
MOST: Final = 20  # violations that are printed in full


class Soak:
    """One run."""

    def __init__(
        self,
        seconds: float,
        seed: int,
        a_second: float,
        logs: Path | None,
        *,
        servers: int,
        faults: list[PlannedFault] | None = None,
        recording: Recording | None = None,
    ) -> None:
        """`servers`: 1 or 3, one for each database; `faults`: these, in place of random ones; `recording`: what the
        dashboard shows is recorded there."""
        self.seconds, self.seed, self.a_second = seconds, seed, a_second
        self._logs = logs
        self._server_names = server_names(servers)
        self._faults, self._recording = faults, recording
        self._stack = ExitStack()
        self.ledger = Ledger(GIVE_UP_AFTER)
        self.scanner = Scanner(self.ledger)
        self.took = 0.0
        self.stalls = 0
        self._printed = 0  # violations
        self._stopping = threading.Event()

    def __enter__(self) -> Self:
        stack, ledger = self._stack, self.ledger
        several = len(self._server_names) > 1
        # appendfsync always: a killed Redis must not lose what it has acknowledged.
        self.rig = Rig(
            own=[which for which in DATABASES if which != "broker"] if several else (),
            aof="always",
            visibility_timeout=f"{LEASE:.0f}",
            give_up_after=GIVE_UP_AFTER,
            resend_cooldown=2,
            connect_timeout=2,  # as these two ship: a busy machine must not run into them
            send_timeout=10,
            reply_timeout=5,  # what ships; a rig waits longer for the sake of loaded machines
        )
        stack.callback(self.rig.close)
        relays = [Relay(ledger), Relay(ledger)]
        for relay in relays:
            stack.enter_context(running(relay))
        fronts = [stack.enter_context(TcpProxy(relay.port)) for relay in relays]
        self.rig.settings["VERIFY_RELAYS"] = ",".join(f"smtp://127.0.0.1:{front.port}" for front in fronts)
        self.rig.caller.listener.heard = Unkept(lambda heard: ledger.replied(*heard))
        self.rig._events.heard = Unkept(lambda heard: self.scanner.scan_event(heard[1]))
        producer = logging.getLogger("producer")
        producer.setLevel(logging.DEBUG)
        producer.addHandler(self.scanner)
        producer.propagate = False
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it would report the proxies' broken connections
        self._own = {f"VERIFY_{which.upper()}_URL": self.rig.url(which) for which in DATABASES}
        codes, broker, results = (self.rig.url(which) for which in DATABASES)
        settings = Settings(codes_url=codes, broker_url=broker, results_url=results, locale="en")
        others = BY_API + BY_WRONG_CLOCK * len(CLOCKS)
        self.callers = Callers(ledger, settings, self.seed, self.a_second * (1 - others))
        servers = {name: self.rig.servers[name] if several else self.rig.server for name in self._server_names}
        self.fault_runner = FaultRunner(
            self.rig, ledger, self.scanner, self.callers, list(zip(relays, fronts, strict=True)), servers, self._logs
        )
        stack.callback(self.fault_runner.close)
        if self._recording is not None:
            self.fault_runner.binds = self._recording.binds
        self.fault_runner.start_processes(stack, apis=self._recording is None)
        self._start_others(settings)
        if self._recording is not None:
            stack.enter_context(self._recording).open({**self.rig.settings, **self._own}, self.callers)
        return self

    def _start_others(self, settings: Settings) -> None:
        """Everybody who does not push to Redis; what `make picture` shows needs only those that ask again."""
        self._again = AskAgain(self.ledger, self.callers, self.seed)
        self._others: list[EndUsers | ApiCallers | WrongClock] = []
        if self._recording is not None:
            return
        users = EndUsers(self.ledger, settings, self.seed)
        self.fault_runner.consume = users.consume_now
        self._others = [ApiCallers(self.callers, self.fault_runner.apis, self.seed, self.a_second * BY_API), users]
        for name, seconds in CLOCKS.items():
            clock = WrongClock(
                self.callers, {**self.rig.settings, **self._own}, name, seconds, self.a_second * BY_WRONG_CLOCK
            )
            self._stack.callback(clock.close)
            self._others.append(clock)

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> None:
        """Make the faults, wait for their end, and check the promises."""
        self.ledger.began = began = time.monotonic()
        threading.Thread(target=self._watch_clock, daemon=True).start()
        for each in (self._again, self.callers, *self._others):
            each.start()
        if self._recording is not None:
            self._recording.begin()
        with contextlib.suppress(KeyboardInterrupt):
            self._run_faults(began)
        self.took = time.monotonic() - began
        print("waiting for the last faults to end", flush=True)
        self.fault_runner.wait()
        for each in (self.callers, *self._others):
            each.stop()
        if self._recording is not None:
            self._recording.stop()
        self._settle()
        self._again.stop()
        self._last_requests()
        self.fault_runner.look(within=120)
        self._check()
        self._stopping.set()

    def _watch_clock(self) -> None:
        """Record when the machine ran nothing for a while."""
        last = time.monotonic()
        while not self._stopping.wait(0.1):
            now = time.monotonic()
            if now - last > STALLED:
                self.stalls += 1
                self.ledger.stalled(last)
            last = now

    def _run_faults(self, began: float) -> None:
        servers = len(self._server_names)
        faults = schedule(self.seed, self.seconds, servers) if self._faults is None else list(self._faults)
        shown = 0.0
        while (now := time.monotonic() - began) < self.seconds:
            while faults and faults[0].at <= now:
                self.fault_runner.begin(faults.pop(0))
            if now - shown >= PROGRESS:
                shown = now
                self.fault_runner.look()
                self._collect()
                self._print_progress(now)
            time.sleep(0.05)

    def _print_progress(self, now: float) -> None:
        held = {}
        with contextlib.suppress(redis.RedisError), connect(self.rig.url("broker"), timeout=1) as client:
            held = held_in(client)
        ledger = self.ledger
        for each in ledger.violations[self._printed : MOST]:
            print(f"VIOLATED: {each}", flush=True)
        self._printed = len(ledger.violations)
        print(
            f"{now:6.0f} s: {len(ledger.records)} asked, {len(ledger.unanswered())} open, "
            f"{self._again.waiting} to ask again, {ledger.mails} mails, {self.fault_runner.done.total()} faults, "
            f"{len(ledger.violations)} violations; held: {held or 'nothing'}",
            flush=True,
        )

    def _collect(self) -> None:
        with contextlib.suppress(redis.RedisError), connect(self.rig.url("results"), timeout=2) as client:
            self.ledger.read_missing(client)

    def _settle(self) -> None:
        deadline = time.monotonic() + SETTLED
        read = 0.0
        while time.monotonic() < deadline and self._unsettled():
            self.fault_runner.look()
            self._collect()
            if not self.rig.held() and time.monotonic() - read > PROGRESS:
                self._read_stored()
                read = time.monotonic()
            time.sleep(1)
        if held := self.rig.held():
            self.ledger.violated(f"{SETTLED:.0f} s after the last fault there is still {held}")

    def _unsettled(self) -> bool:
        return bool(self.rig.held() or self._again.waiting or self.ledger.unanswered())

    def _last_requests(self) -> None:
        """Without faults, everything succeeds, and nothing is sent twice."""
        how = "VerificationClient.request"
        records = [self.ledger.asking(self.callers.address("last"), how) for _ in range(LAST)]
        self.callers.ask_last(records)
        deadline = time.monotonic() + LAST_WITHIN
        while time.monotonic() < deadline and any(record.error is None for record in records):
            self._collect()
            time.sleep(0.2)
        for record in records:
            if record.error != ErrorCode.SUCCESS:
                self.ledger.violated(f"after the last fault, a request was answered {record.error}", record)

    def _read_stored(self) -> set[str]:
        """Compare every stored reply with the one that was heard, if any was; their keys."""
        keys = {key.decode() for key in self.rig.results.scan_iter(META + "*", count=1000)}
        self.ledger.read_stored(self.rig.results, keys)
        return keys

    def _check(self) -> None:
        ledger = self.ledger
        time.sleep(1)  # for what was published last
        stored = self._read_stored()
        ledger.check()
        oldest = time.monotonic() - KEPT
        for record in ledger.records:
            if record.error not in {None, 1} and record.at > oldest and f"{META}{record.request_id}" not in stored:
                ledger.violated("the reply is not stored", record)
        poisonous = sum(record.error == ErrorCode.EXCEPTION for record in ledger.records)
        dead = self.rig.broker.llen("verification.dead")
        if not ledger.dead_least <= dead <= ledger.dead_most + poisonous:
            ledger.violated(f"{dead} dead letters, not {ledger.dead_least} to {ledger.dead_most + poisonous}")
        for which, client in (("codes", self.rig.codes), ("results", self.rig.results)):
            if lasting := keys_without_ttl(client):
                ledger.violated(f"keys without a TTL in {which}: {lasting[:5]}")
        # A Redis that a fault restarted ends with the thread that did it: this is the last moment to ask it.
        self._server = self.rig.results.info("server")
        self.fault_runner.close()
        self.scanner.check(ledger.codes())

    def report(self) -> str:
        """One page."""
        ledger, fault_runner = self.ledger, self.fault_runner
        names = {str(int(code)): f"{code:d} {code.title}" for code in ErrorCode}
        outcomes = sorted((names.get(error, error), count) for error, count in ledger.outcomes().items())
        lines = [
            f"# Soak of {self.took / 60:.1f} minutes, seed {self.seed}",
            "",
            (
                f"**Lost: {ledger.breaches[Breach.LOST]}. Violations: {len(ledger.violations)}.** "
                f"{len(ledger.records):,} requests, {ledger.mails:,} mails, {fault_runner.done.total():,} faults."
            ),
            "",
            *_table("| what may never be | times |", ((breach, ledger.breaches[breach]) for breach in Breach)),
            *_table("| requests by outcome | |", outcomes),
            f"By caller: {_list(Counter(record.how for record in ledger.records))}.",
            "",
            "Faults, and how many times:",
            "",
            *_faults(fault_runner.done),
            "",
            *_table("| | |", self._figures()),
            *self._memory(),
            *self._conditions(),
        ]
        return "\n".join(lines)

    def _figures(self) -> Iterable[tuple[str, object]]:
        ledger, fault_runner = self.ledger, self.fault_runner
        yield "mails that came whole and were not refused", f"{ledger.mails:,}"
        yield "second mails, permitted by promise 3", ledger.doubles["permitted"]
        yield (
            "of these, because the sender hung up after the final dot while no fault was under way",
            ledger.unanswered_dots,
        )
        again = [record for record in ledger.records if record.ones]
        served = sum(record.error not in {None, 1} for record in again)
        yield "requests answered 1 by a worker, asked again under their ids", f"{len(again):,}"
        yield "of these, answered otherwise then", f"{served:,}"
        yield "replies of 1 that only a worker's log tells of", ledger.unheard
        checks = ", ".join(f"{error}: {count:,}" for error, count in sorted(ledger.checks.items()))
        yield "checks of mailed codes, by answer", checks or 0
        for how in ("HTTP API", "gRPC API"):
            yield f"{how}: requests that the restarted process refused or cut off", ledger.refused[how]
        wrong = any("dead letters" in each for each in ledger.violations)
        expected = f"{ledger.dead_least} to {ledger.dead_most}"
        yield "dead letters", "wrong" if wrong else f"{expected} expected, all there"
        yield "logs and events looked through", f"{self.scanner.bytes / 2**20:.0f} MiB"
        yield "worker processes", fault_runner.started["worker"]
        yield "API processes", fault_runner.started["api"]
        yield "longest from SIGTERM to a process' end", f"{fault_runner.slowest_exit:.1f} s"
        if len(ledger.latencies) >= 20:
            cuts = statistics.quantiles(ledger.latencies, n=100)
            what = f"ask to reply while nothing was broken, p50 / p99 of {len(ledger.latencies):,}"
            yield what, f"{cuts[49] * 1000:.0f} / {cuts[98] * 1000:.0f} ms"
        yield "longest that a client's `request` took", f"{self.callers.slowest:.1f} s"
        yield f"times that the machine ran nothing for {STALLED:.0f} s", self.stalls

    def _memory(self) -> list[str]:
        """How the memory of the processes that were never ended grew."""
        warm = min(WARM_UP, self.took / 2)
        rows = []
        for name in STEADY:
            points = [(at / 3600, kib / 1024) for at, kib in self.fault_runner.rss[name] if at >= warm]
            if len(points) >= 3:
                hours, mib = zip(*points, strict=True)
                slope, _ = statistics.linear_regression(hours, mib)
                rows.append(f"| {name} | {mib[0]:.1f} | {mib[-1]:.1f} | {max(mib):.1f} | {slope:+.1f} |")
        if not rows:
            return []
        rate = len(self.ledger.records) / max(self.took, 1)
        return [
            (
                "Memory (RSS) of a worker that was frozen and cut off and of an API process that was cut off, neither "
                f"ever ended; from minute {warm / 60:.0f} on, under {rate:.0f} requests a second in all:"
            ),
            "",
            "| process | first, MiB | last | most | slope, MiB an hour |",
            "|---|---:|---:|---:|---:|",
            *rows,
            "",
        ]

    def _conditions(self) -> list[str]:
        info = self._server
        server = f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info['redis_version']}"
        threads = {name: count for name, (count, _) in SHARES.items()}
        where = "three servers, one for each database" if len(self._server_names) > 1 else "one server"
        return [
            (
                f"Conditions: {WORKERS} workers (log level DEBUG), 2 API processes, 2 relays. {self.a_second:.0f} "
                f"requests a second planned: from {threads['blocking']} threads of a blocking client, "
                f"{threads['asyncio']} tasks of an asyncio client, raw LPUSH, a stock Celery app, HTTP, gRPC, and two "
                f"clients whose clocks are 600 s slow and fast. {server}, {where}; AOF, appendfsync always: what a "
                f"killed server had not written would be its own loss. VERIFY_VISIBILITY_TIMEOUT={LEASE:.0f}, "
                f"VERIFY_GIVE_UP_AFTER={GIVE_UP_AFTER}, VERIFY_RESEND_COOLDOWN=2. A fault every "
                f"{EVERY[0]:.0f} to {EVERY[1]:.0f} s, but none in the last {CALM:.0f} s of each {MINUTE:.0f}."
            ),
            "",
            f"{installed()}.",
        ]


def _list(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))


def _faults(done: Counter[str]) -> Iterable[str]:
    """A line for each group of faults."""
    groups: dict[str, Counter[str]] = {}
    for name, count in done.items():
        group, _, what = name.rpartition(": ")
        groups.setdefault(group or "queue", Counter())[what] = count
    return [f"- **{group}:** {_list(counts)}" for group, counts in sorted(groups.items())]


def _table(head: str, rows: Iterable[tuple[str, object]]) -> list[str]:
    counts = ((name, f"{count:,}" if isinstance(count, int) else count) for name, count in rows)
    return [head, "|---|---:|", *(f"| {name} | {count} |" for name, count in counts), ""]


def main() -> int:
    """The exit code: 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="the schedule of faults; drawn and printed if not given")
    parser.add_argument("--rate", type=float, default=55.0, help="requests a second")
    parser.add_argument(
        "--servers", type=int, choices=(1, 3), default=3, help="Redis servers: one for all, or for each"
    )
    parser.add_argument("--report", type=Path, help="write the report here too")
    parser.add_argument(
        "--record", type=Path, help="long faults in turn, and what the dashboard shows of them written here"
    )
    parser.add_argument("--logs", type=Path, help="keep the workers' logs in this directory")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(10**6)
    if options.logs is not None:
        options.logs.mkdir(parents=True, exist_ok=True)
    seconds = options.minutes * 60
    faults, recording = (long_faults(), Recording()) if options.record is not None else (None, None)
    servers = 1 if recording else options.servers
    print(f"soak: {options.minutes:g} minutes, seed {seed}, servers {servers}", flush=True)
    with Soak(seconds, seed, options.rate, options.logs, servers=servers, faults=faults, recording=recording) as soak:
        soak.run()
        if recording is not None:
            recording.write(options.record, soak.ledger, min(seconds, soak.took))
        report = soak.report()
        violations = soak.ledger.violations
    print(f"\n{report}\n")
    if options.report is not None:
        options.report.write_text(report + "\n")
    for kind, like in Counter(each.partition("\n")[0] for each in violations).most_common():
        print(f"VIOLATED {like} times: {kind}", file=sys.stderr)
        for each in [each for each in violations if each.partition("\n")[0] == kind][:MOST]:
            print(each, file=sys.stderr)
    return 1 if violations else 0
