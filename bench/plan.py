"""How much is measured, by `make bench` and with QUICK=1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LETTERS: Final = "abcdefghijklmn"
RELAY_SLOW_MS: Final = 50.0  # bars b and g
RELAY_SLOWEST_MS: Final = 200.0  # bar i
BACKLOGS: Final = (1_000, 100_000, 1_000_000)  # bar h
LONE_BACKLOG: Final = 100_000  # bar j
PROCESSES: Final = 2  # of whatever drains with more than one, or answers with one for each core
USUAL_CONNECTIONS: Final = 32  # of one process to the relay, unless it is as shipped
MANY_CONNECTIONS: Final = 256  # of one system to a slow relay: as many as callers wait

# Mails a second that a system drains here, about, at 0 ms: from it follows how many make a run long enough. A count of
# mails, and not a time, is what a drain is measured over.
USUAL_RATE: Final = {
    "worker": 10_000,
    "pool": 18_000,
    "bullmq": 4_000,
    "bullmq_pipelined": 9_000,
    "dramatiq": 2_000,
    "celery": 800,
}
WARM: Final = {"worker": 6_000, "pool": 5_000}  # mails after which ours is warm; a peer says how many it needs
_SHIPPED: Final = "All settings at their defaults (events, leases, marks, cooldown, limits)"
OURS: Final = {  # title and setting of what is ours
    "asyncio": (
        "VerifyServer, asyncio client",
        f"`AsyncVerificationClient` on uvloop in one process, two workers. {_SHIPPED}; 128 connections each at 50 ms.",
    ),
    "api": (
        "VerifyServer, gRPC API",
        "`python -m producer serve`, two workers (l, m: one; n: one or two); set as above. The Node servers' load.",
    ),
    "worker": (
        "VerifyServer",
        f"`celery -A worker.app worker`, as many processes as said, 32 relay connections each. {_SHIPPED}.",
    ),
    "pool": (
        "bare SMTP pool",
        "The worker's relay pool and renderer alone in one process, 32 connections: no queue, no codes, no replies.",
    ),
}


@dataclass(frozen=True)
class Plan:
    """Times are seconds."""

    quick: bool
    rounds: int  # of A B A B; a multiple of 2 and 3, so that each of as many systems begins equally often
    callers: tuple[int, ...]  # that ask at once, relay at 0 ms
    slow_callers: tuple[int, ...]  # the same, relay at 50 ms
    replacing: dict[float, tuple[int, ...]]  # bar l: callers by ms of the relay
    replacing_plain: tuple[int, ...]  # callers, bar m
    second: tuple[int, ...]  # callers, bar n
    ask: float  # of one run of asking
    lone: float  # of one run of a lone caller
    ask_slow: float  # of one run of asking in which each answer takes long, as what comes after its end is not counted
    drain: float  # of the measured part of a drain
    peers: tuple[str, ...]  # that drain
    slow_connections: tuple[int, ...]  # bar g
    hold: float  # of one run with a held backlog
    hold_rounds: int
    alone: float  # of one run of a lone caller behind a backlog; longer, if fewer than the next were answered
    alone_least: int
    ladder: tuple[int, ...]  # worker processes, bar i
    step: float  # of one step of the ladder
    climbs: int  # of the ladder, up and down by turns
    starts: int  # of each program
    left_out: tuple[str, ...] = ()


FULL: Final = Plan(
    quick=False,
    rounds=6,
    callers=(1, 16, 64, 256),
    slow_callers=(64, 256),
    replacing={0.0: (1, 5, 64, 256), RELAY_SLOW_MS: (1, 5, 64, 256)},
    replacing_plain=(64, 256),
    second=(1, 5, 64),
    ask=4.0,
    lone=4.0,
    ask_slow=6.0,
    drain=4.0,
    peers=("bullmq", "bullmq_pipelined", "dramatiq", "celery"),
    slow_connections=(32, 256),
    hold=3.0,
    hold_rounds=3,
    alone=20.0,
    alone_least=4,
    ladder=(1, 2, 4, 8),
    step=6.0,
    climbs=4,
    starts=15,
)

QUICK: Final = Plan(
    quick=True,
    rounds=2,
    callers=(1, 64, 256),
    slow_callers=(64, 256),
    replacing={0.0: (1, 64), RELAY_SLOW_MS: (256,)},
    replacing_plain=(64,),
    second=(1, 64),
    ask=1.2,
    lone=1.0,
    ask_slow=2.0,
    drain=1.2,
    peers=("bullmq", "bullmq_pipelined"),
    slow_connections=(32,),
    hold=1.2,
    hold_rounds=1,
    alone=6.0,
    alone_least=1,
    ladder=(1, 8),
    step=2.0,
    climbs=2,
    starts=2,
    left_out=(
        "two rounds in place of six, each run 1 to 2 s; h has one round, j one answer",
        "16 callers; in l, m and n some numbers of callers",
        "dramatiq and stock Celery",
        "g with 256 connections, i with 2 and 4 workers, j while others keep coming",
        "the report, which is drawn from whole runs",
    ),
)
