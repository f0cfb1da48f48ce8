"""The soak: steady load, a random fault every few seconds, every promise checked at the end, and a report of one page.

`make soak MINUTES=10 SEED=1`, or `.venv/bin/python -m bench.soak run --minutes 10 --seed 1`.
Ctrl-C ends the faults early and checks what was done until then; twice, it ends at once.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self

import redis
from support.caller import META
from support.rig import Rig, held_in, keys_without_ttl
from support.smtp_server import running
from support.tcp_proxy import TcpProxy

from bench.soak import installed
from bench.soak.callers import SHARES, Callers
from bench.soak.faults import (
    CALM,
    EVERY,
    MINUTE,
    WORKERS,
    FaultRunner,
    PlannedFault,
    Relay,
    Unkept,
    long_faults,
    schedule,
)
from bench.soak.ledger import KEPT, Ledger, Scanner
from bench.soak.recording import Recording
from producer.contract import ErrorCode
from producer.settings import Settings

VISIBILITY: Final = 3  # seconds: what a dead worker held comes back soon
GIVE_UP_AFTER: Final = 60  # seconds
SETTLED: Final = GIVE_UP_AFTER + 30.0  # seconds after the last fault within which nothing may be left anywhere
PROGRESS: Final = 10.0  # seconds
LAST: Final = 30  # requests after the last fault, which must all succeed
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
        faults: list[PlannedFault] | None = None,
        recording: Recording | None = None,
    ) -> None:
        """`faults`: these, in place of random ones; `recording`: what the dashboard shows is recorded there."""
        self.seconds, self.seed, self.a_second = seconds, seed, a_second
        self._logs = logs
        self._faults, self._recording = faults, recording
        self._stack = ExitStack()
        self.ledger = Ledger(GIVE_UP_AFTER)
        self.scanner = Scanner(self.ledger)
        self.took = 0.0
        self._printed = 0  # violations

    def __enter__(self) -> Self:
        stack, ledger = self._stack, self.ledger
        # appendfsync always: a killed Redis must not lose what it has acknowledged.
        self.rig = Rig(
            aof="always",
            visibility_timeout=VISIBILITY,
            give_up_after=GIVE_UP_AFTER,
            resend_cooldown=2,
            connect_timeout=1,
            send_timeout=4,
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
        settings = Settings(redis_url=self.rig.server.url(), locale="en")
        self.callers = Callers(ledger, settings, self.seed, self.a_second)
        self.fault_runner = FaultRunner(
            self.rig, ledger, self.scanner, self.callers, list(zip(relays, fronts, strict=True)), self._logs
        )
        stack.callback(self.fault_runner.close)
        if self._recording is not None:
            self.fault_runner.binds = self._recording.binds
        proxies = [stack.enter_context(TcpProxy(self.rig.server.port)) for _ in range(WORKERS - 1)]
        self.fault_runner.start_workers(proxies)
        if self._recording is not None:
            own = {"VERIFY_REDIS_URL": self.rig.server.url()}
            stack.enter_context(self._recording).open({**self.rig.settings, **own}, self.callers)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> None:
        """Make the faults, wait for their end, and check the promises."""
        self.ledger.began = began = time.monotonic()
        self.callers.start()
        if self._recording is not None:
            self._recording.begin()
        with contextlib.suppress(KeyboardInterrupt):
            self._run_faults(began)
        self.took = time.monotonic() - began
        print("waiting for the last faults to end", flush=True)
        self.fault_runner.wait()
        self.callers.stop()
        if self._recording is not None:
            self._recording.stop()
        self._settle()
        self._last_requests()
        self.fault_runner.look()
        self._check()

    def _run_faults(self, began: float) -> None:
        faults = schedule(self.seed, self.seconds) if self._faults is None else list(self._faults)
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
        with contextlib.suppress(redis.RedisError), self.rig.server.client(1, socket_timeout=1) as client:
            held = held_in(client)
        ledger = self.ledger
        for each in ledger.violations[self._printed : MOST]:
            print(f"VIOLATED: {each}", flush=True)
        self._printed = len(ledger.violations)
        print(
            f"{now:6.0f} s: {len(ledger.records)} asked, {len(ledger.unanswered())} open, {ledger.mails} mails, "
            f"{self.fault_runner.done.total()} faults, {len(ledger.violations)} violations; held: {held or 'nothing'}",
            flush=True,
        )

    def _collect(self) -> None:
        with contextlib.suppress(redis.RedisError), self.rig.server.client(2, socket_timeout=2) as client:
            self.ledger.read_missing(client)

    def _settle(self) -> None:
        deadline = time.monotonic() + SETTLED
        while time.monotonic() < deadline and (self.rig.held() or self.ledger.unanswered()):
            self._collect()
            if not self.rig.held():
                self._read_stored()
            time.sleep(1)
        if held := self.rig.held():
            self.ledger.violated(f"{SETTLED:.0f} s after the last fault there is still {held}")

    def _last_requests(self) -> None:
        """Without faults, everything succeeds, and nothing is sent twice."""
        how = "VerificationClient.request"
        records = [self.ledger.asking(self.callers.address("last"), how) for _ in range(LAST)]
        self.callers.ask_last(records)
        for record in records:
            if record.answer != ErrorCode.SUCCESS:
                self.ledger.violated(f"after the last fault, a request was answered {record.answer}", record)

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
            if record.error is not None and record.at > oldest and f"{META}{record.request_id}" not in stored:
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
        lost = sum(1 for record in ledger.records if record.acknowledged and record.error is None)
        lines = [
            f"# Soak of {self.took / 60:.1f} minutes, seed {self.seed}",
            "",
            (
                f"**Lost: {lost}. Violations: {len(ledger.violations)}.** "
                f"{len(ledger.records)} requests, {ledger.mails} mails, {fault_runner.done.total()} faults."
            ),
            "",
            *_table("| requests by outcome | |", outcomes),
            *_table("| requests by caller | |", sorted(Counter(r.how for r in ledger.records).items())),
            *_table("| faults | times |", sorted(fault_runner.done.items())),
            "| | |",
            "|---|---:|",
            f"| mails that came whole and were not refused | {ledger.mails} |",
            f"| second mails, permitted by promise 3 | {ledger.doubles['permitted']} |",
            f"| second mails, not permitted | {ledger.doubles['not permitted']} |",
            f"| dead letters | {ledger.dead_least} to {ledger.dead_most} expected, all there |"
            if not any("dead letters" in each for each in ledger.violations)
            else "| dead letters | wrong |",
            f"| logs and events looked through | {self.scanner.bytes / 2**20:.0f} MiB |",
            f"| worker processes | {fault_runner.started} |",
            f"| most memory of a worker | {fault_runner.peak_rss / 1024:.0f} MiB |",
        ]
        if len(ledger.latencies) >= 20:
            cuts = statistics.quantiles(ledger.latencies, n=100)
            lines.append(
                f"| ask to reply while nothing was broken, p50 / p99 of {len(ledger.latencies)} "
                f"| {cuts[49] * 1000:.0f} / {cuts[98] * 1000:.0f} ms |"
            )
        lines.append(f"| longest that a client's `request` took | {self.callers.slowest:.1f} s |")
        lines += ["", *self._conditions()]
        return "\n".join(lines)

    def _conditions(self) -> list[str]:
        info = self._server
        server = f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info['redis_version']}"
        threads = {name: count for name, (count, _) in SHARES.items()}
        return [
            (
                f"Conditions: {WORKERS} workers (log level DEBUG), 2 relays, {self.a_second:.0f} requests a second "
                f"from {threads['blocking']} threads of a blocking client, {threads['asyncio']} tasks of an asyncio "
                f"client, raw LPUSH and a stock Celery app. {server}, AOF, appendfsync always: what a killed server "
                f"had not written would be its own loss. VERIFY_VISIBILITY_TIMEOUT={VISIBILITY}, "
                f"VERIFY_GIVE_UP_AFTER={GIVE_UP_AFTER}, VERIFY_RESEND_COOLDOWN=2, VERIFY_SEND_TIMEOUT=4. A fault every "
                f"{EVERY[0]:.0f} to {EVERY[1]:.0f} s, but none in the last {CALM:.0f} s of each {MINUTE:.0f}."
            ),
            "",
            f"{installed()}.",
        ]


def _table(head: str, rows: Iterable[tuple[str, int]]) -> list[str]:
    return [head, "|---|---:|", *(f"| {name} | {count} |" for name, count in rows), ""]


def main() -> int:
    """The exit code: 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="the schedule of faults; drawn and printed if not given")
    parser.add_argument("--rate", type=float, default=30.0, help="requests a second")
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
    print(f"soak: {options.minutes:g} minutes, seed {seed}", flush=True)
    with Soak(seconds, seed, options.rate, options.logs, faults=faults, recording=recording) as soak:
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
