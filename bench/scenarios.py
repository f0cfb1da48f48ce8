"""What is measured with what, in which order: A B A B, so that a change of the machine meets all alike."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Final, TypeVar

from bench import ask, drain, hold, ladder, peers, rig, starts
from bench.ask import Asked
from bench.drain import Drained, PeerDrain, Pool, Share, Workers
from bench.peers import Peer
from bench.plan import (
    BACKLOGS,
    LONE_BACKLOG,
    MANY_CONNECTIONS,
    PROCESSES,
    RELAY_SLOW_MS,
    RELAY_SLOWEST_MS,
    USUAL_CONNECTIONS,
    USUAL_RATE,
    WARM,
    Plan,
)
from bench.session import Scenario, Session
from bench.sink import Sink

_OVERHEAD: Final = 0.8  # seconds of a run in which nothing is measured: processes start, Redis is emptied, counts

_WARM_UP: Final = 3.0  # seconds until a system that is asked is warm

T = TypeVar("T")


def scenarios(plan: Plan, letters: str) -> list[Scenario]:
    """Those that these bars need."""
    every: list[Scenario] = [
        Starts(plan),
        Asking(plan, letters, 0.0),
        Asking(plan, letters, RELAY_SLOW_MS),
        Draining(plan, letters),
        Limit(plan),
        Ladder(plan),
        Lone(plan),
        Backlogs(plan),
        Replacing(plan, 0.0, tls=True),
        Replacing(plan, RELAY_SLOW_MS, tls=True),
        Replacing(plan, 0.0, tls=False),
        Second(plan),
    ]
    return [each for each in every if set(each.bars) & set(letters)]


class Asking:
    """Callers ask and wait: our client, our API, the best Node server."""

    def __init__(self, plan: Plan, letters: str, relay_ms: float) -> None:
        self.bars = "b" if relay_ms else "acd"
        self.title = f"Ask and be answered, relay {relay_ms:g} ms"
        self._relay = relay_ms / 1000
        self._connections = MANY_CONNECTIONS if relay_ms else USUAL_CONNECTIONS
        self._turns = turns(plan, letters, slow=relay_ms > 0)
        self._plan = plan
        one_round = sum(
            len(names) * (_time_of(plan, callers, slow=relay_ms > 0) + _OVERHEAD)
            for callers, names in self._turns.items()
        )
        self.seconds = 3 + _WARM_UP * len(self._systems) + one_round * plan.rounds

    @property
    def _systems(self) -> list[str]:
        return list(dict.fromkeys(name for names in self._turns.values() for name in names))

    async def run(self, session: Session) -> None:
        """See `Scenario`."""
        async with AsyncExitStack() as stack:
            sink = await stack.enter_async_context(Sink(self._relay))
            asked: dict[str, Asked] = {}
            if {"asyncio", "api"} & set(self._systems):
                own = stack.enter_context(rig.opened())
                for each in await stack.enter_async_context(
                    ask.ours(own, sink.url, PROCESSES, self._connections // PROCESSES)
                ):
                    asked[each.system] = each
            for name in self._systems:
                if name in peers_by_name():
                    place = stack.enter_context(rig.opened())
                    asked[name] = await stack.enter_async_context(
                        ask.theirs(place, sink, peers_by_name()[name], PROCESSES, self._connections // PROCESSES)
                    )
            for name in self._systems:
                await asked[name].warm_up()
            for number in range(1, self._plan.rounds + 1):
                for callers, names in self._turns.items():
                    seconds = _time_of(self._plan, callers, slow=self._relay > 0)
                    for name in rotate(names, number):
                        measure = partial(ask.measure, sink, asked[name], callers, seconds, number=number)
                        await session.take(f"round {number}, {callers} callers, {name}", measure)


def turns(plan: Plan, letters: str, *, slow: bool) -> dict[int, list[str]]:
    """Who is asked, by how many callers."""
    found: dict[int, list[str]] = {}
    for callers in plan.slow_callers if slow else plan.callers:
        if slow:
            ours = ["asyncio"] if plan.quick else ["asyncio", "api"]
        else:
            ours = ["asyncio"] if "a" in letters and (callers > 1 or not plan.quick) else []
            ours += ["api"] if ("d" if callers == 1 else "c") in letters else []
        if ours:
            found[callers] = [*ours, "old_best"]
    return found


class Replacing:
    """Our gRPC API and one worker in place of the old server, both as they ship."""

    def __init__(self, plan: Plan, relay_ms: float, *, tls: bool) -> None:
        self.bars = "l" if tls else "m"
        self.title = f"Replace the old server, {'TLS' if tls else 'no TLS'}, relay {relay_ms:g} ms"
        self._relay, self._tls, self._plan = relay_ms / 1000, tls, plan
        self._callers = plan.replacing[relay_ms] if tls else plan.replacing_plain
        self.seconds = 4 + 2 * _WARM_UP + _time_of_two(plan, self._callers, relay_ms)

    async def run(self, session: Session) -> None:
        """See `Scenario`."""
        async with AsyncExitStack() as stack:
            sink = await stack.enter_async_context(Sink(self._relay, tls=self._tls))
            own, place = stack.enter_context(rig.opened()), stack.enter_context(rig.opened())
            if self._tls:
                own.variables["SSL_CERT_FILE"] = str(sink.trusted)
            _, api = await stack.enter_async_context(ask.ours(own, sink.login_url(tls=self._tls), 1))
            peer = peers_by_name()["old"]
            old = await stack.enter_async_context(ask.theirs(place, sink, peer, 1, 1, tls=self._tls))
            await _take_turns(session, self._plan, sink, (api, old), self._callers, "replace")


class Second:
    """Two workers where one suffices, as they ship: each pair has an API and a Redis of its own."""

    bars = "n"
    title = "A second worker"

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.seconds = 4 + 2 * _WARM_UP + _time_of_two(plan, plan.second, 0.0)

    async def run(self, session: Session) -> None:
        """See `Scenario`."""
        async with AsyncExitStack() as stack:
            sink = await stack.enter_async_context(Sink(0))
            systems = []
            for workers in (1, 2):
                own = stack.enter_context(rig.opened())
                _, api = await stack.enter_async_context(ask.ours(own, sink.url, workers))
                systems.append(api)
            await _take_turns(session, self._plan, sink, systems, self._plan.second, "second")


async def _take_turns(
    session: Session, plan: Plan, sink: Sink, systems: Sequence[Asked], callers: Sequence[int], scenario: str
) -> None:
    for each in systems:
        await each.warm_up()
    for number in range(1, plan.rounds + 1):
        for count in callers:
            for each in rotate(systems, number):
                seconds = _time_of(plan, count, slow=_long_turns(count, sink.latency))
                measure = partial(ask.measure, sink, each, count, seconds, number=number, scenario=scenario)
                await session.take(f"round {number}, {count} callers, {each.system} on {each.workers}", measure)


def _time_of(plan: Plan, callers: int, *, slow: bool) -> float:
    """Seconds of one run of asking. `slow`: a caller's turn is long, and what has begun at the end is not counted."""
    if callers == 1:
        return plan.lone
    return plan.ask_slow if slow else plan.ask


def _long_turns(callers: int, latency: float) -> bool:
    """Of a slow relay, and of the old server with more callers than it has CPU for."""
    return latency > 0 or callers > 64


def _time_of_two(plan: Plan, callers: Sequence[int], latency: float) -> float:
    """Seconds of all runs of two systems."""
    each = sum(_time_of(plan, count, slow=_long_turns(count, latency)) + _OVERHEAD for count in callers)
    return plan.rounds * 2 * each


class Draining:
    """Two workers against the peers; one worker against the bare SMTP pool."""

    bars = "ef"
    title = "Drain, relay 0 ms"

    def __init__(self, plan: Plan, letters: str) -> None:
        self._plan = plan
        self._peers = plan.peers if "e" in letters else ()
        self._alone = "f" in letters
        names = [*(["worker"] if "e" in letters else []), *self._peers, *(["worker", "pool"] if self._alone else [])]
        self.seconds = plan.rounds * sum(plan.drain + _warm(name) / USUAL_RATE[name] + 4 for name in names)

    async def run(self, session: Session) -> None:
        """See `Scenario`."""
        async with AsyncExitStack() as stack:
            sink = await stack.enter_async_context(Sink(0))
            own = stack.enter_context(rig.opened())
            groups: list[list[Drained]] = []  # in each, all begin equally often
            if self._peers:
                found: list[Drained] = [Workers(own, PROCESSES, USUAL_CONNECTIONS)]
                for name in self._peers:
                    place = stack.enter_context(rig.opened())
                    found.append(PeerDrain(place, peers_by_name()[name], PROCESSES, USUAL_CONNECTIONS))
                groups += [found[:3], found[3:]]  # those of the bar, those that are only stated
            if self._alone:
                groups.append([Workers(own, 1, USUAL_CONNECTIONS), Pool(own, USUAL_CONNECTIONS)])
            for number in range(1, self._plan.rounds + 1):
                for each in (each for group in groups for each in rotate(group, number)):
                    name = each.system
                    share = Share(_warm(name), round(USUAL_RATE[name] * self._plan.drain))
                    measure = partial(drain.measure, sink, each, share, scenario="drain", number=number)
                    await session.take(f"round {number}, {name} on {each.workers}", measure)


def _warm(system: str) -> int:
    """How many mails it has to send until it is warm: each process of a peer needs so many."""
    return WARM[system] if system in WARM else peers_by_name()[system].warm_after * PROCESSES


class Limit:
    """One worker on a relay that takes its time: connections ÷ latency is all that can be had."""

    bars = "g"
    title = f"Drain, relay {RELAY_SLOW_MS:g} ms"

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.seconds = plan.rounds * len(plan.slow_connections) * (plan.drain + 5)

    async def run(self, session: Session) -> None:
        """See `Scenario`."""
        with rig.opened() as own:
            async with Sink(RELAY_SLOW_MS / 1000) as sink:
                for number in range(1, self._plan.rounds + 1):
                    for connections in self._plan.slow_connections:
                        # All connections end their mails at about the same time: a whole number of their turns.
                        turn = connections * round(1000 / RELAY_SLOW_MS)  # in a second
                        share = Share(2 * turn, round(self._plan.drain + 1) * turn)
                        worker = Workers(own, 1, connections)
                        measure = partial(drain.measure, sink, worker, share, scenario="limit", number=number)
                        await session.take(f"round {number}, {connections} connections", measure)


class Backlogs:
    """One worker, with so many requests waiting, one number after the other."""

    bars = "h"
    title = "Drain at a backlog that stays"

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.seconds = 5 + plan.hold_rounds * (len(BACKLOGS) * (plan.hold + 2) + 19)

    async def run(self, session: Session) -> None:
        """See `Scenario`."""
        with rig.opened() as own:
            async with Sink(0) as sink:
                await session.take("bytes in Redis", partial(hold.weighed, own))
                for number in range(1, self._plan.hold_rounds + 1):
                    backlogs = rotate(BACKLOGS, number)
                    measure = partial(hold.drained, own, sink, backlogs, self._plan.hold, number=number)
                    await session.take(f"round {number}, {' '.join(f'{each:,}' for each in backlogs)}", measure)


class Lone:
    """A caller alone, behind a backlog of others."""

    bars = "j"
    title = f"A lone caller behind {LONE_BACKLOG:,} requests"

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._waves = (False,) if plan.quick else (False, True)
        self.seconds = plan.hold_rounds * len(self._waves) * (plan.alone + 10)

    async def run(self, session: Session) -> None:
        """See `Scenario`."""
        time = (self._plan.alone, self._plan.alone_least)
        with rig.opened() as own:
            async with Sink(0) as sink:
                for number in range(1, self._plan.hold_rounds + 1):
                    for wave in self._waves:
                        measure = partial(hold.lone, own, sink, LONE_BACKLOG, *time, number=number, wave=wave)
                        others = "others keep coming" if wave else "nobody comes after"
                        await session.take(f"round {number}, {others}", measure)


class Ladder:
    """From one worker process to eight, and back."""

    bars = "i"
    title = f"Scaling, relay {RELAY_SLOWEST_MS:g} ms"

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.seconds = plan.climbs * (len(plan.ladder) * (plan.step + 2) + 5)

    async def run(self, session: Session) -> None:
        """See `Scenario`."""
        with rig.opened() as own:
            async with Sink(RELAY_SLOWEST_MS / 1000) as sink:
                for number in range(1, self._plan.climbs + 1):
                    steps = alternate(self._plan.ladder, number)
                    measure = partial(ladder.climb, own, sink, steps, self._plan.step, number=number)
                    await session.take(f"round {number}, {' '.join(map(str, steps))} workers", measure)


class Starts:
    """Import, start, memory."""

    bars = "k"
    title = "Import, start, idle memory"

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.seconds = plan.starts * 6.0

    async def run(self, session: Session) -> None:
        """See `Scenario`."""
        with rig.opened() as own:
            async with Sink(0) as sink:
                for number in range(1, self._plan.starts + 1):
                    await session.take(f"round {number}", partial(starts.start, own, sink, number=number))


def alternate(steps: Sequence[int], number: int) -> Sequence[int]:
    """Up in odd rounds, down in even ones: what grows with time alone does not look like an effect of the steps."""
    return steps if number % 2 else steps[::-1]


def rotate(steps: Sequence[T], number: int) -> Sequence[T]:
    """Begun one further in each round: in as many rounds as there are steps, each has each place once."""
    first = (number - 1) % max(1, len(steps))
    return [*steps[first:], *steps[:first]]


def peers_by_name() -> dict[str, Peer]:
    """All that can be measured."""
    return {each.name: each for each in peers.PEERS}
