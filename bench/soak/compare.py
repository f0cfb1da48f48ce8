"""Counts what stock Celery and VerifyServer lose under the same faults: `.venv/bin/python -m bench.soak compare`.

Both get the same messages from the same caller, and the same relay. A worker that the fault kills is started again half
a second later, as a supervisor would do; one that ends by itself is not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from support.caller import QUEUE, address, message
from support.malformed import malformed_messages
from support.process import eventually
from support.rig import Calling, Rig, held_in
from support.smtp_server import Act, Later, ScriptedServer
from support.tcp_proxy import MUTE, PASS
from support.worker_process import WorkerProcess

from bench.soak import installed

VISIBILITY: Final = 5  # seconds; the same for both
TIMEOUT: Final = VISIBILITY + 15.0  # seconds after the fault within which a reply counts as given
SUPERVISED: Final = 0.5  # seconds until a killed worker is started again
ROUNDS: Final = 5
PROCESSES: Final = 4  # of the stock worker
STOCK: Final = "stock Celery"
OURS: Final = "VerifyServer"
FINAL: Final = {"SUCCESS", "FAILURE"}
_SAME: Final = re.compile(rb"^(?:Message-ID: .*|\d{6,})", re.MULTILINE)  # what two mails of one request must share


class StockWorker(WorkerProcess):
    """`celery -A bench.soak.stock_celery worker`, prefork."""

    def __init__(self, settings: Mapping[str, str], *, log_level: str = "INFO") -> None:
        super().__init__(settings, log_level=log_level)
        words = ["-A", "bench.soak.stock_celery", "worker", "-P", "prefork", "-c", str(PROCESSES), "-l", log_level]
        options = ["-n", self.name, "--without-gossip", "--without-mingle"]
        self.command = [sys.executable, "-m", "celery", *words, *options]

    def kill(self) -> None:
        """Kill all its processes at once, as when a host dies."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@dataclass
class Counted:
    """The counts of one run."""

    asked: int = 0
    replies: int = 0
    failed: int = 0  # of these, other than Success
    mails: int = 0
    second: int = 0  # mails beyond the first of a request
    alike: int = 0  # of these, with the Message-ID and the code of the first
    waiting: int = 0  # without a reply, and still in Redis
    lost: int = 0  # without a reply, and gone
    dead_letters: int = 0
    serves: bool = False  # one more request, after all
    ended: bool = False  # the process did, by itself

    def cells(self) -> str:
        """Its row of the table."""
        alive = "yes" if self.serves else "**no**, ended" if self.ended else "**no**, runs and serves nothing"
        lost = f"**{self.lost}**" if self.lost else "0"
        second = f"{self.second} ({self.alike} alike)" if self.second else "0"
        replies = f"{self.replies} ({self.failed} no Success)" if self.failed else str(self.replies)
        numbers = (self.asked, replies, self.mails, second, self.waiting, lost, self.dead_letters)
        return " | ".join([*map(str, numbers), alive])


class Side:
    """A deployment with one of the two workers."""

    def __init__(self, who: str, **options: Any) -> None:
        self.who = who
        self.rig = Rig(aof="always", visibility_timeout=VISIBILITY, log_level="INFO", **options)
        self.ids: dict[str, str] = {}  # address -> id
        self.worker: WorkerProcess
        self.start_worker()

    def start_worker(self) -> None:
        """Start a worker."""
        kind = StockWorker if self.who == STOCK else WorkerProcess
        self.worker = kind(self.rig.settings, log_level="INFO")
        self.rig._stack.callback(self.worker.close)
        self.worker.start()

    def push(self, count: int, *, every: float = 0.0) -> list[str]:
        """Requests for addresses of their own; each is repeated under its id until Redis acknowledges it."""
        emails = []
        for _ in range(count):
            email = address()
            envelope = message({"email": email})
            until = time.monotonic() + 30
            assert self.rig.caller.push_despite_faults(envelope, lambda until=until: time.monotonic() > until)  # type: ignore[misc]  # bound at once
            self.ids[email] = envelope["headers"]["id"]
            emails.append(email)
            time.sleep(every)
        return emails

    def restart_killed(self) -> None:
        """Start the worker again, as a supervisor does."""
        eventually(lambda: not self.worker.alive)
        time.sleep(SUPERVISED)
        self.start_worker()

    def count(self) -> Counted:
        """Wait until every request has its reply, or the timeout is over; then count."""
        deadline = time.monotonic() + TIMEOUT
        while len(self._final()) < len(self.ids) and time.monotonic() < deadline:
            time.sleep(0.1)
        replies = Counter(self._final().values())
        counted = Counted(asked=len(self.ids), replies=replies.total(), failed=replies[False])
        counted.dead_letters = self.rig.broker.llen("verification.dead")
        fresh = self.ids.pop(self.push(1)[0])
        deadline = time.monotonic() + 10
        while not self.rig.caller.answered([fresh]) and time.monotonic() < deadline:
            time.sleep(0.1)
        counted.ended = not self.worker.alive
        counted.serves = not counted.ended and bool(self.rig.caller.answered([fresh]))
        mails = [mail for mail in list(self.rig.relay.mails) if mail.recipient in self.ids]
        counted.mails = len(mails)
        counted.second = len(mails) - len({mail.recipient for mail in mails})
        named = [mail for mail in mails if b"Message-ID" in mail.content]
        alike = Counter((mail.recipient, *_SAME.findall(mail.content)) for mail in named)
        counted.alike = alike.total() - len(alike)
        in_redis, final = self._still_there(), self._final()
        for request_id in self.ids.values():
            if request_id not in final:
                if request_id in in_redis:
                    counted.waiting += 1
                else:
                    counted.lost += 1
        return counted

    def _final(self) -> dict[str, bool]:
        """Whether each final reply is Success. Stock Celery also stores RETRY, which is not final."""
        stored = {each: self.rig.caller.stored(each) for each in self.ids.values()}
        return {
            each: meta["status"] == "SUCCESS" and meta["result"]["error"] == 0
            for each, meta in stored.items()
            if meta and meta["status"] in FINAL
        }

    def _still_there(self) -> str:
        broker = self.rig.broker
        places = [*broker.lrange(QUEUE, 0, -1), *broker.hvals("unacked"), *broker.hvals("verification.parked")]
        return "\n".join(map(repr, [*places, *self.rig.dead_letters()]))


Fault = Callable[[Side], None]


@dataclass(frozen=True)
class Scenario:
    """A fault that both get."""

    name: str
    why: str
    do: Fault
    relay: dict[str, Act | list[Act]] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def killed_at_reserve(side: Side) -> None:
    """Redis has handed a message out; the worker dies before it can say so."""
    proxy = side.rig.redis_proxy
    for _ in range(ROUNDS):
        side.push(5, every=0.02)
        time.sleep(1)  # done, and waiting for the next one
        proxy.mode = MUTE
        side.push(5, every=0.02)
        time.sleep(0.3)
        side.worker.kill()
        proxy.reset()
        proxy.mode = PASS
        side.restart_killed()


def _killed_at(step: str, text: str) -> Fault:
    def do(side: Side) -> None:
        for _ in range(ROUNDS):
            emails = [address() for _ in range(10)]
            envelopes = [message({"email": email}) for email in emails]
            acts: list[Act] = [Calling(text, side.worker.kill)]
            side.rig.script(emails[4], **{step: acts})
            side.rig.broker.lpush(QUEUE, *(json.dumps(each) for each in envelopes))
            side.ids |= {email: each["headers"]["id"] for email, each in zip(emails, envelopes, strict=True)}
            side.restart_killed()

    return do


def killed_under_load(side: Side) -> None:
    """Five times, with 50 requests a second."""
    for part in range(ROUNDS):
        kill = threading.Timer(0.4 + part * 0.013, side.worker.kill)
        kill.start()
        side.push(40, every=0.02)
        kill.join()
        side.restart_killed()


def redis_restarted(side: Side) -> None:
    """Killed while messages are held, back after a second; the caller goes on."""
    side.push(40)
    side.rig.server.kill()
    time.sleep(1)
    side.rig.server.start()
    side.push(40, every=0.05)


def _malformed(what: str) -> Fault:
    raw = malformed_messages()[what]

    def do(side: Side) -> None:
        side.push(5)
        side.rig.broker.lpush(QUEUE, raw)
        side.push(20)

    return do


def hung_up_on(side: Side) -> None:
    """Every connection of the worker, three times under load."""
    for _ in range(3):
        side.push(30, every=0.02)
        for kind in ("normal", "pubsub"):
            side.rig.broker.client_kill_filter(_type=kind, skipme=True)
        side.push(10, every=0.02)


def results_away(side: Side) -> None:
    """For three seconds, with the broker there; the caller goes on."""
    server = side.rig.servers["results"]
    side.push(20, every=0.02)
    server.kill()
    side.push(40, every=0.075)
    server.start()
    side.push(10, every=0.02)


def relay_busy(side: Side) -> None:
    """451 to every recipient for five seconds."""
    side.rig.relay.script["rcpt"] = "451 4.3.0 later"
    side.push(40, every=0.02)
    time.sleep(4)
    del side.rig.relay.script["rcpt"]


def stopped(side: Side) -> None:
    """SIGTERM with a queue of 60, mails that take 0.3 s, and a new worker as soon as the old one is gone."""
    side.push(60)
    time.sleep(1)
    side.worker.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        side.worker.wait(60)
    side.start_worker()


SCENARIOS: Final = [
    Scenario(
        "kill -9 between reserve and delivery, 5 times",
        "BRPOP takes a message off the queue, and only a second command writes it to `unacked`: what dies in between "
        "loses it. Our script moves a message in one step, so it is on the queue or in `unacked` at every instant.",
        killed_at_reserve,
        options={"redis_proxy": True},
    ),
    Scenario(
        "kill -9 at 50 requests a second, 5 times",
        "The same two commands and the same doubts as in the rows around, met by chance.",
        killed_under_load,
    ),
    Scenario(
        "kill -9 in mid-DATA with 10 at once, 5 times",
        "Both get the messages back after the visibility timeout, and send again what may have been accepted. Ours has "
        "all ten on the wire at once, stock Celery four: so many are in doubt. Ours are the same mail, code and "
        "Message-ID, so that a mailbox can tell.",
        _killed_at("content", ""),
    ),
    Scenario(
        "kill -9 as the relay says 250, with 10 at once, 5 times",
        "The same, after the final dot. Ours sends once more and never a third time.",
        _killed_at("dot", "250 2.0.0 ok"),
    ),
    Scenario(
        "Redis killed and restarted under a busy worker",
        "A stock task that cannot store its result, or cannot publish its retry, is answered FAILURE, whether its mail "
        "was accepted or not. In ours what is held stays in `unacked`, and the worker settles it when Redis is back; a "
        "request that was taken at that very moment may be told RedisErr.",
        redis_restarted,
        {"dot": Later("250 2.0.0 ok", 0.1)},
    ),
    Scenario(
        "malformed message: not JSON",
        "kombu decodes before anyone can catch, and the worker ends. Ours looks at the envelope in the script that "
        "takes it, and moves what is unfit to the dead letters in the same step.",
        _malformed("not JSON"),
    ),
    Scenario("malformed message: `[]`", "The same check.", _malformed("list")),
    Scenario(
        "malformed message: no `id`",
        "Stock Celery cannot handle it, and puts it back; it comes again, and nothing else does.",
        _malformed("no id"),
    ),
    Scenario(
        "malformed message: `expires` is no time",
        "Stock Celery logs it and drops it; ours keeps it as a dead letter with the reason.",
        _malformed("bad expires"),
    ),
    Scenario(
        "malformed message: body is no base64",
        "As with what is not JSON, one step later.",
        _malformed("bad base64"),
    ),
    Scenario(
        "CLIENT KILL of every connection, 3 times under load",
        "Celery requeues what it holds at each reconnect while the tasks still run, so they run twice. Ours leaves "
        "what it holds where it is, and settles it over the next connection.",
        hung_up_on,
        {"dot": Later("250 2.0.0 ok", 0.1)},
    ),
    Scenario(
        "results database away for 3 s",
        "A stock task whose result cannot be stored is acked, and its reply is lost. Ours keeps what it could not "
        "reply, and replies when it can; the mark keeps a repetition from sending.",
        results_away,
        options={"own": ("results",)},
    ),
    Scenario(
        "relay says 451 for 5 s",
        "Both retry. Stock Celery holds a waiting retry in the worker and in `unacked`; ours keeps it in Redis.",
        relay_busy,
    ),
    Scenario(
        "SIGTERM under load",
        "Both finish what is in hand and leave the rest to the next worker.",
        stopped,
        {"dot": Later("250 2.0.0 ok", 0.3)},
    ),
]


def run(scenario: Scenario, who: str) -> Counted:
    """Run it once, on servers of its own."""
    side = Side(who, relay=ScriptedServer(scenario.relay), **scenario.options)
    with contextlib.closing(side.rig):
        scenario.do(side)
        counted = side.count()
        left = held_in(side.rig.broker)
    print(f"{scenario.name}: {who}: {counted}; left: {left or 'nothing'}", file=sys.stderr, flush=True)
    return counted


def conditions() -> str:
    """The conditions of the runs, for the page."""
    return (
        f"{installed()}. Redis with AOF, appendfsync always. Visibility timeout {VISIBILITY} s for both; a reply "
        f"counts if it came within {TIMEOUT:.0f} s of the fault. Stock Celery: prefork, {PROCESSES} processes. Ours: "
        "one process, default settings otherwise. Each row is one run."
    )


def main() -> None:
    """Print the page's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only scenarios whose name contains this")
    parser.add_argument("--report", type=Path, help="write the table here too")
    options = parser.parse_args()
    head = "| fault | who | requests | replies | mails | second mails | waiting | lost | dead letters | worker serves |"
    lines = [head, "|---|---|" + "---:|" * 7 + "---|"]
    whys = []
    for scenario in SCENARIOS:
        if options.only not in scenario.name:
            continue
        rows = [run(scenario, who).cells() for who in (STOCK, OURS)]
        lines += [f"| {scenario.name} | {STOCK} | {rows[0]} |", f"| | {OURS} | {rows[1]} |"]
        whys.append(f"- **{scenario.name}**: {scenario.why}")
    text = "\n".join([*lines, "", *whys, "", conditions()])
    print(text)
    if options.report is not None:
        options.report.write_text(text + "\n")
