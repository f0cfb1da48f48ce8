"""Replaces a Redis primary under load: what is lost, what is sent twice, how long nothing is served.

`.venv/bin/python -m bench.soak failover --runs 10 killed` prints the counts.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from support.caller import META, Listener
from support.process import HOST, eventually
from support.redis_server import RedisServer
from support.rig import Rig
from support.sentinel_servers import SentinelServers, role
from support.tcp_proxy import HOLE, TcpProxy

from bench.soak.callers import Callers
from bench.soak.faults import Relay, Unkept
from bench.soak.ledger import Ledger, Record
from producer.settings import Settings

GIVE_UP_AFTER: Final = 60
BEFORE: Final = 3.0  # seconds of load before the fault
CALM: Final = 6.0  # seconds of load after the failover
WINDOW: Final = 1.0  # seconds before the fault whose writes may not have reached the replica
NOTICED: Final = 4.0  # seconds after the sentinels' announcement in which our connections move, on a busy machine too
DEMOTED: Final = 90.0  # seconds until the sentinels have made the old primary a replica, on a busy machine too
BEHIND: Final = 0.5  # seconds

_RAW, _CELERY = "LPUSH", "Celery.send_task"
_OTHERS: Final = {_RAW, _CELERY}  # callers whose library asks the sentinels only when it connects
# Violations in the ledger that the loss of a primary's last writes explains.
_LOST, _REPLIES = "lost: acknowledged, and never answered", "a second reply"
_CODES: Final = ("two codes for", "two codes under one id")  # the first one was lost with its primary


@dataclass
class Outcome:
    """The counts of one run."""

    asked: int = 0
    acknowledged: int = 0
    redis_err: int = 0  # callers that were answered RedisErr
    lost: int = 0  # acknowledged, never answered, and nowhere on the new primary
    lost_raw: int = 0  # of these, pushed with plain Redis
    lost_celery: int = 0  # of these, sent by a stock Celery app
    doubled: int = 0  # requests with two mails
    new_codes: int = 0  # addresses with two codes within one life
    codes_gone: int = 0  # requests answered Success whose code is not in Redis any more
    without: float = 0.0  # seconds, the longest between two replies of Success
    longest: float = 0.0  # seconds that a client's `request` took at most
    unexplained: list[str] = field(default_factory=list)

    def row(self) -> str:
        """For a table."""
        return (
            f"| {self.asked} | {self.acknowledged} | {self.redis_err} "
            f"| {self.lost} | {self.lost_raw} | {self.lost_celery} "
            f"| {self.doubled} | {self.codes_gone} | {self.without:.1f} s | {self.longest:.1f} s |"
        )


HEAD: Final = (
    "| asked | acknowledged | told RedisErr | lost | of these raw | of these by Celery | mailed twice | codes gone "
    "| without service | longest `request` |\n|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


class Failover:
    """One deployment, one fault, one count."""

    def __init__(self, servers: SentinelServers, *, a_second: float = 100, workers: int = 2, seed: int = 1) -> None:
        self.ledger = Ledger(GIVE_UP_AFTER)
        self.rig = Rig(
            sentinels=servers,
            relay=Relay(self.ledger),
            visibility_timeout=3,
            give_up_after=GIVE_UP_AFTER,
            resend_cooldown=2,
            reply_timeout=5,  # what ships
        )
        self.servers = servers
        self.rig.caller.listener.heard = Unkept()
        self.rig._events.heard = Unkept()
        # It listens to each server: a replica repeats what its primary publishes.
        self._listeners = [Listener(server.url(2), f"{META}*") for server in servers.servers]
        for listener in self._listeners:
            listener.heard = Unkept(lambda heard: self.ledger.replied(*heard))
        self.callers = Callers(self.ledger, Settings(redis_url=servers.url(), locale="en"), seed, a_second)
        try:
            self.rig.add_workers(workers)
        except BaseException:
            self.close()
            raise

    def run(self, fault: Callable[[SentinelServers], object]) -> Outcome:
        """Load, the fault, load again, silence; the counts."""
        self.callers.start()
        time.sleep(BEFORE)
        old = self.servers.primary
        began = time.monotonic()
        window = self.ledger.begin("Redis: primary", "replaced", doubts=True)
        fault(self.servers)
        self.servers.wait_for_another(old)
        named = time.monotonic()
        time.sleep(NOTICED)
        self.ledger.end(window)
        time.sleep(CALM)
        if old.pid:
            eventually(lambda: role(old) == "slave", DEMOTED)
        demoted = time.monotonic()
        self.callers.stop()
        self._settle()
        return self._count(began, named + NOTICED, demoted if old.pid else named)

    def _settle(self) -> None:
        """Wait until nothing is left anywhere, and read what is stored: a failover cuts off those who listen."""
        results = self.rig.results
        for client in (results, self.rig.broker):
            client.connection_pool.disconnect()  # it may still be on the old primary
        eventually(lambda: not self.rig.held(), GIVE_UP_AFTER)
        self.ledger.read_stored(results, [key.decode() for key in results.scan_iter(META + "*", count=1000)])

    def _count(self, began: float, noticed: float, demoted: float) -> Outcome:
        """`demoted`: when the old primary stops taking writes."""

        def explained(record: Record) -> bool:
            until = demoted if record.how in _OTHERS else min(noticed, demoted)
            return began - WINDOW < record.acknowledged_at and record.at < until

        ledger = self.ledger
        ledger.check()
        found = Outcome(
            asked=len(ledger.records),
            acknowledged=sum(record.acknowledged for record in ledger.records),
            redis_err=sum(record.answer == 1 for record in ledger.records),
            doubled=sum(ledger.doubles.values()),
            longest=self.callers.slowest,
        )
        served = sorted(each.answered_at for each in ledger.records if each.error == 0)
        served = [at for at in served if began - WINDOW < at < noticed + CALM]
        found.without = max(after - before for before, after in pairwise(served))
        gone = self._gone()
        found.codes_gone = len(gone)
        found.unexplained += [ledger.story(each) for each in gone if not began - WINDOW < each.mails[-1].at < demoted]
        lost = [record for record in ledger.records if record.acknowledged and record.error is None]
        found.lost = len(lost)
        found.lost_raw = sum(record.how == _RAW for record in lost)
        found.lost_celery = sum(record.how == _CELERY for record in lost)
        found.unexplained += [ledger.story(record) for record in lost if not explained(record)]
        for violation in ledger.violations:
            if violation.startswith(_CODES[0]):
                found.new_codes += 1
            elif not violation.startswith((*_CODES, _LOST, _REPLIES)):
                found.unexplained.append(violation)
        found.unexplained += [f"the worker ended:\n{w.log[-2000:]}" for w in self.rig.workers if not w.alive]
        return found

    def _gone(self) -> list[Record]:
        """Requests answered Success whose code is not in Redis."""
        mailed = [record for record in self.ledger.records if record.error == 0 and record.mails]
        with self.servers.client() as codes:
            live = codes.mget([f"code_{record.email}" for record in mailed])
        return [record for record, code in zip(mailed, live, strict=True) if code is None]

    def ask_once_more(self) -> Record:
        """One more request, with its answer."""
        record = self.ledger.asking(self.callers.address("last"), "VerificationClient.request")
        self.callers.ask_last([record])
        return record

    def close(self) -> None:
        """End everything."""
        for listener in self._listeners:
            listener.close()
        self.rig.close()


def killed(servers: SentinelServers) -> None:
    """The primary dies."""
    servers.primary.kill()


def cut_off(servers: SentinelServers) -> None:
    """The primary loses its network, and dies half a second later: what it still acknowledges reaches no replica."""
    primary, replicas = servers.primary, servers.others
    with TcpProxy(primary.port) as proxy:
        eventually(lambda: all(_follows(each, proxy.port) for each in replicas))
        proxy.mode = HOLE
        time.sleep(BEHIND)
        primary.kill()


def _follows(replica: RedisServer, port: int) -> bool:
    """Whether it has its primary's data through this port. If it uses another one, as the sentinels have it some ten
    seconds later, it is told."""
    with replica.client() as client:
        state = client.info("replication")
        if state["master_port"] != port:
            client.replicaof(HOST, port)
            return False
        return bool(state["master_link_status"] == "up")


def frozen(servers: SentinelServers) -> None:
    """The primary hangs, its connections stay; after its replacement it resumes, and still acts as primary."""
    primary = servers.primary
    primary.pause()
    servers.wait_for_another(primary)
    primary.resume()


def planned(servers: SentinelServers) -> None:
    """An operator orders the failover, as Redis' sentinels do it."""
    servers.fail_over()


def coordinated(servers: SentinelServers) -> None:
    """An operator orders it, as Valkey's sentinels do it since 9.0: the primary itself hands over."""
    servers.fail_over("COORDINATED")


FAULTS: Final = {each.__name__: each for each in (killed, cut_off, frozen, planned, coordinated)}


def main() -> int:
    """Print the table; the exit code is 1 if anything is unexplained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fault", choices=FAULTS)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second")
    parser.add_argument("--guarded", action="store_true", help="min-replicas-to-write 1, min-replicas-max-lag 1")
    options = parser.parse_args()
    guard = ("--min-replicas-to-write", "1", "--min-replicas-max-lag", "1") if options.guarded else ()
    logging.getLogger("producer").setLevel(logging.CRITICAL)
    print(HEAD, flush=True)
    outcomes = []
    for run in range(options.runs):
        failover = Failover(SentinelServers(replicas=2 if guard else 1, options=guard), a_second=options.rate, seed=run)
        try:
            outcome = failover.run(FAULTS[options.fault])
        finally:
            failover.close()
        print(outcome.row(), flush=True)
        outcomes.append(outcome)
        for each in outcome.unexplained[:5]:
            print(f"UNEXPLAINED: {each}", file=sys.stderr, flush=True)
    totals: Counter[str] = Counter()
    for outcome in outcomes:
        row = {name: value for name, value in vars(outcome).items() if isinstance(value, int)}
        totals.update(row)
    print(dict(totals))
    return 1 if any(outcome.unexplained for outcome in outcomes) else 0
