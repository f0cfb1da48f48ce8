"""Run two releases side by side under steady load, in both directions, and check every promise.

OLD is any tag or commit of this repository; NEW is this checkout as it is. There are four stages, with requests in the
workers' hands, in retry and waiting for an ETA whenever a worker is replaced:

  1. new producers and API, old workers     3. old producers and API, new workers
  2. upgrade: one worker after the other    4. rollback: one worker after the other

`make upgrade OLD=v0.1.0`, or `.venv/bin/python -m bench.upgrade v0.1.0`. It takes about two minutes. The exit code is 1
if a promise was broken, and 2 if OLD cannot be run. Ctrl-C ends everything at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from support.api_process import ApiProcess
from support.caller import META, QUEUE
from support.process import WAIT_TIMEOUT, eventually
from support.rig import Rig, held_in, keys_without_ttl
from support.smtp_server import Later, running
from support.worker_process import STOP_WITHIN, WorkerProcess

from bench.soak import installed
from bench.soak.callers import HOST
from bench.soak.faults import Relay, Unkept
from bench.soak.ledger import Breach, Ledger, Record, Scanner
from bench.upgrade.load import Asker, Load
from bench.upgrade.release import CannotRun, Release, unpack, working_tree
from producer.contract import ErrorCode

OLD, NEW = "old", "new"
WORKERS: Final = 2
STAGE: Final = 20.0  # seconds
A_SECOND: Final = 30.0  # requests
VISIBILITY: Final = 3  # seconds
GIVE_UP_AFTER: Final = 30  # seconds
SETTLED: Final = GIVE_UP_AFTER + 30.0  # seconds after the last stage within which nothing may be left anywhere
ACCEPTS_AFTER: Final = 0.3  # seconds that the relay takes, so that requests are in the workers' hands at any time
LAST: Final = 10  # requests of each release after the last stage, which must all succeed
LEFT: Final = "another release"  # as a worker's log begins to say that it left something to the other release
SHOWN: Final = 12  # violations that are printed in full


@dataclass(frozen=True, slots=True)
class Switch:
    """What there was when a worker was replaced."""

    how: str  # stopped or killed
    in_hand: int
    in_retry: int
    until_eta: int


class Upgrade:
    """One run."""

    def __init__(self, old: Release, new: Release, *, seed: int, stage: float = STAGE) -> None:
        """`stage`: seconds of each."""
        self._releases = {OLD: old, NEW: new}
        self._seed, self._stage = seed, stage
        self._stack = ExitStack()
        self.ledger = Ledger(GIVE_UP_AFTER)
        self._scanner = Scanner(self.ledger)
        self._workers: list[tuple[str, WorkerProcess]] = []
        self._stages: list[tuple[str, float]] = []  # name, and when it began
        self.switches: list[Switch] = []
        self.dead: Counter[str] = Counter()  # dead letters by code; there should be none
        self._left = 0  # workers that left something to the other release
        self.took = 0.0

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _open(self) -> None:
        stack, ledger = self._stack, self.ledger
        self._rig = Rig(visibility_timeout=VISIBILITY, give_up_after=GIVE_UP_AFTER, resend_cooldown=2, reply_timeout=20)
        stack.callback(self._rig.close)
        relay = Relay(ledger)
        stack.enter_context(running(relay))
        relay.script["dot"] = Later("250 2.0.0 ok", ACCEPTS_AFTER)
        self._rig.settings["VERIFY_RELAYS"] = f"smtp://127.0.0.1:{relay.port}"
        self._rig.caller.listener.heard = Unkept(lambda heard: ledger.replied(*heard))
        self._load = Load(ledger, relay, self._rig.url("broker"), seed=self._seed, a_second=A_SECOND)
        for side, release in self._releases.items():
            asker = self._load.askers[side] = Asker(release, self._rig.settings, ledger)
            stack.callback(asker.kill)
            api = self._load.apis[side] = ApiProcess(self._rig.settings)
            release.run_by(api)
            stack.callback(api.close)
            api.start(wait=False)
        stack.callback(self._load.stop, wait=False)
        for _ in range(WORKERS):
            self._start_worker(OLD, wait=False)
        for side in self._releases:
            self._load.askers[side].wait_until_ready()
            self._load.apis[side].wait_until_ready()
        for _, worker in self._workers:
            worker.wait_until_ready()

    def _start_worker(self, side: str, *, wait: bool = True) -> None:
        worker = WorkerProcess(self._rig.settings, log_level="INFO")
        self._releases[side].run_by(worker)
        self._stack.callback(worker.close)
        self._workers.append((side, worker))
        worker.start(wait=wait)

    # The stages

    def run(self) -> None:
        """All stages, and the check of the promises."""
        began = time.monotonic()
        self.ledger.began = began
        self._load.start()
        with self._running("new producers, old workers", NEW):
            time.sleep(self._stage)
        with self._running("upgrade", OLD, NEW):
            self._replace_workers(NEW)
        with self._running("old producers, new workers", OLD):
            time.sleep(self._stage)
        with self._running("rollback", OLD, NEW):
            self._replace_workers(OLD)
        self._load.sides = ()
        self._load.stop(wait=True)
        self._say("waiting until all is answered")
        self._settle()
        self._ask_last()
        self._check()
        self.took = time.monotonic() - began

    @contextmanager
    def _running(self, name: str, *sides: str) -> Iterator[None]:
        self._stages.append((name, time.monotonic()))
        self._say(name)
        self._load.sides = sides
        yield
        self._rig_is_well()

    def _replace_workers(self, side: str) -> None:
        """Replace the workers in turn: one is stopped once its successor runs, the next one is killed first."""
        before = list(self._workers)
        for number, (_, worker) in enumerate(before):
            time.sleep(self._stage / len(before) / 2)
            killed = number % 2 == 1
            if not killed:
                self._start_worker(side)
            self._record_switch("killed" if killed else "stopped")
            if killed:
                window = self.ledger.begin("worker: kill -9", f"worker {number}", doubts=True)
                worker.kill()
                self.ledger.end(window)
            else:
                began = time.monotonic()
                code = worker.stop()
                if code != 0 or time.monotonic() - began > STOP_WITHIN + WAIT_TIMEOUT:
                    self.ledger.violated(f"a worker that was told to end ended with {code}", breach=Breach.WORKER)
            self._retire(worker)
            if killed:
                self._start_worker(side)
            time.sleep(self._stage / len(before) / 2)

    def _record_switch(self, how: str) -> None:
        """Wait until there is a request in each of the states that matter, and record how many."""

        def look() -> Switch:
            fields = self._rig.broker.hkeys(f"{QUEUE}.parked")
            until_eta = sum(b"." in field for field in fields)  # by the tag of a reservation, not by a request's id
            return Switch(how, self._rig.broker.hlen("unacked"), len(fields) - until_eta, until_eta)

        found = look()
        deadline = time.monotonic() + WAIT_TIMEOUT
        while not (found.in_hand and found.in_retry and found.until_eta) and time.monotonic() < deadline:
            time.sleep(0.01)
            found = look()
        self.switches.append(found)
        self._say(
            f"a worker is {how}; in hand {found.in_hand}, in retry {found.in_retry}, until an ETA {found.until_eta}"
        )

    def _retire(self, worker: WorkerProcess) -> None:
        self._workers = [(side, each) for side, each in self._workers if each is not worker]
        self._read_log(worker)
        worker.close()

    def _read_log(self, worker: WorkerProcess) -> None:
        log = worker.log_path.read_bytes()
        self._scanner.scan(log, worker.name)
        self._left += LEFT.encode() in log

    def _rig_is_well(self) -> None:
        for side, worker in list(self._workers):
            if not worker.alive:
                self.ledger.violated(
                    f"a worker of the {side} release ended by itself:\n{worker.log[-2000:]}", breach=Breach.WORKER
                )
                self._retire(worker)
                self._start_worker(side)
        for side, api in self._load.apis.items():
            if not api.alive:
                self.ledger.violated(f"the API of the {side} release ended by itself", breach=Breach.API)

    # The end

    def _settle(self) -> None:
        deadline = time.monotonic() + SETTLED
        while (self._rig.held() or self.ledger.unanswered()) and time.monotonic() < deadline:
            time.sleep(0.5)
            self.ledger.read_missing(self._rig.results)
            if not self._rig.held() and self._rig.broker.llen("verification.dead"):
                break  # who asked for a dead letter waits in vain
        if held := self._rig.held():
            self.ledger.violated(f"{SETTLED:.0f} s after the last stage there is still {held}")

    def _ask_last(self) -> None:
        records = [
            self._last(side, how, number)
            for side in self._releases
            for how in ("enqueue", "request")
            for number in range(LAST // 2)
        ]
        with contextlib.suppress(AssertionError):  # what is lost is found below
            eventually(lambda: all(record.error is not None for record in records))
        for record in records:
            if record.error != ErrorCode.SUCCESS:
                self.ledger.violated(f"after the last stage, a request was answered {record.error}", record)

    def _last(self, side: str, how: str, number: int) -> Record:
        return self._load.ask(side, how, f"last.{side}.{how}.{number}@{HOST}")

    def _check(self) -> None:
        ledger, rig = self.ledger, self._rig
        self._rig_is_well()
        for asker in self._load.askers.values():
            asker.close()
        keys = {key.decode() for key in rig.results.scan_iter(META + "*", count=1000)}
        ledger.read_stored(rig.results, keys)
        for letter in rig.dead_letters():
            self.dead[json.loads(letter).get("code") or "no code"] += 1
        if self.dead:
            ledger.violated(f"dead letters: {dict(self.dead)}")
        ledger.check()
        for which, client in (("codes", rig.codes), ("results", rig.results)):
            if lasting := keys_without_ttl(client):
                ledger.violated(f"keys without a TTL in {which}: {lasting[:5]}")
        for switch in self.switches:
            if not (switch.in_hand and switch.in_retry and switch.until_eta):
                ledger.violated(f"a worker was {switch.how} when there was nothing to lose: {switch}")
        for _, worker in self._workers:
            self._read_log(worker)
        self._scanner.check(ledger.codes())

    # What it says

    def _say(self, what: str) -> None:
        held = held_in(self._rig.broker)
        seconds = time.monotonic() - self.ledger.began
        print(f"{seconds:4.0f} s: {len(self.ledger.records):5} asked; {what}; held: {held or 'nothing'}", flush=True)

    def report(self) -> str:
        """What there was, and whether the promises held."""
        ledger, breaches = self.ledger, self.ledger.breaches
        old, new = self._releases[OLD].name, self._releases[NEW].name
        verdict = f"{len(ledger.violations)} violations" if ledger.violations else "every promise held"
        how = Counter(switch.how for switch in self.switches)
        ends = [began for _, began in self._stages[1:]] + [float("inf")]
        stages = [
            f"{name} {sum(began <= record.at < end for record in ledger.records)}"
            for (name, began), end in zip(self._stages, ends, strict=True)
        ]
        return "\n".join(
            [
                f"{old} and {new} side by side, {self.took:.0f} s, seed {self._seed}: {verdict}.",
                f"{len(ledger.records)} requests ({', '.join(stages)}), {ledger.mails} mails.",
                f"By caller: {_list(Counter(record.how for record in ledger.records))}.",
                f"Answered: {_list(ledger.outcomes())}.",
                (
                    f"Workers replaced: {_list(how)}, with {_span(each.in_hand for each in self.switches)} requests in "
                    f"hand, {_span(each.in_retry for each in self.switches)} in retry, "
                    f"{_span(each.until_eta for each in self.switches)} until an ETA."
                ),
                (
                    f"Lost {breaches[Breach.LOST]}, dead letters {self.dead.total()}, third mails "
                    f"{breaches[Breach.THIRD]}, other codes {breaches[Breach.OTHER_CODE]}, second mails "
                    f"{ledger.doubles['permitted']} permitted by a kill and {ledger.doubles['not permitted']} not."
                ),
                f"Workers that left requests to the other release: {self._left}.",
                f"{installed()}.",
            ]
        )


def _list(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"


def _span(numbers: Iterator[int]) -> str:
    found = list(numbers)
    return f"{min(found)} to {max(found)}" if found else "no"


def main(words: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.upgrade", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", metavar="OLD", help="a tag or commit")
    parser.add_argument("--seed", type=int, default=None, help="of the callers' choices")
    parser.add_argument("--stage", type=float, default=STAGE, metavar="SECONDS", help="length of each stage")
    options = parser.parse_args(words)
    seed = random.randrange(10**6) if options.seed is None else options.seed
    try:
        with tempfile.TemporaryDirectory(prefix="release-", ignore_cleanup_errors=True) as directory:
            with Upgrade(unpack(options.old, Path(directory)), working_tree(), seed=seed, stage=options.stage) as run:
                run.run()
            print(*(f"VIOLATED: {each}" for each in run.ledger.violations[:SHOWN]), run.report(), sep="\n", flush=True)
            return 1 if run.ledger.violations else 0
    except CannotRun as exc:
        sys.stderr.write(f"{exc}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
