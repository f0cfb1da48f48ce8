"""One cell: the requests are made, the fault strikes at its step, and what is left is looked at once all is quiet."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import uuid
from collections.abc import Callable
from typing import Any, Final

from support.caller import META, QUEUE, message
from support.rig import BUGS, code_in, held_in, keys_without_ttl, reference, reference_in

from bench.crash_map.forks import Child
from bench.crash_map.lane import POLL, Ask, Lane, Stalled, Worker, keys_of, lateness, until
from bench.crash_map.network import RECEIVED, RELAY, SENT, Frame, Step, label
from bench.crash_map.promises import Asked, Outcome, Sent
from bench.crash_map.scenarios import GIVE_UP_AFTER, LEASE, LONG, SCENARIOS, SHORT, Actor, Cell, Fault
from worker.queue.commands import BLOCK_TIME, HANDOVER

_QUIET_WITHIN: Final = GIVE_UP_AFTER + 20  # seconds in which every request has its reply, and nothing is left of it
_STALL: Final = LEASE / 2  # seconds without a sign of life from which on a lease may lapse on a healthy worker
_REACHES: Final = 0.05  # seconds in which a frame surely reaches the other side
_ID: Final = re.compile(rb'"id": ?"([^"]+)"')
# The keys of the broker database that belong to no request, or that go by themselves.
_KEPT: Final = re.compile(rb".+\.(dead$|workers$|unhealthy_workers$|waiter$|turn$)|_kombu\.|.*\.pidbox|celeryev")
# Lines with a traceback that are Celery's own way to report a lost connection.
_TOLERATED: Final = ("Connection error: network", "Connection to broker lost")


async def run(lane: Lane, cell: Cell) -> Outcome:
    """Run the cell. If the machine is too busy, the outcome says so and nothing else."""
    async with lateness() as late:
        try:
            trial = await Trial.prepared(lane, cell)
            try:
                outcome = await trial.outcome()
            finally:
                await trial.end()
        except Stalled as exc:
            outcome = Outcome(stalled=str(exc))
    if late.most > _STALL:
        outcome.stalled = f"the map itself was {late.most:.1f} s late"
    return outcome


class Trial:
    """One run of one cell."""

    def __init__(self, lane: Lane, cell: Cell, helper: Worker) -> None:
        """`helper`: a worker that no fault concerns, able to take over."""
        self._lane, self._cell, self._helper = lane, cell, helper
        self._scenario = SCENARIOS[cell.place.scenario]
        self._network = lane.network
        self._email = f"user.{uuid.uuid4().hex[:10]}@example.com"
        self._victim: Child
        self._worker: Worker | None = None  # the victim, if it is one
        self._ask: Ask | None = None  # asks the victim, if that is a client or an API
        self._queued: dict[str, float] = {}  # by id: the loop time at which Redis got the request
        self._pushes: list[Frame] = []  # of a client or an API
        self._answers: list[asyncio.Task[int | None]] = []
        self._struck_at: int | None = None
        self._in_effect = 0
        self._unfinished = False
        self._over = asyncio.Event()
        self._over.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._replacing: asyncio.Task[Worker] | None = None

    @classmethod
    async def prepared(cls, lane: Lane, cell: Cell) -> Trial:
        """With everything that the lane needs for it."""
        await lane.configure(cell.place)
        return cls(lane, cell, await lane.helper())

    async def outcome(self) -> Outcome:
        """Run it. Raises `Stalled`."""
        scenario = self._scenario
        await self._start()
        if scenario.relay:
            self._lane.relay.scripts[self._email] = {step: list(acts) for step, acts in scenario.relay.items()}
        if scenario.before:
            await self._make(scenario.before)
            await self._until_quiet(scenario.before)
            await asyncio.sleep(scenario.pause)
            self._lane.relay.mails.clear()
            self._queued.clear()
            self._pushes.clear()
            self._answers.clear()
        if scenario.consumed:
            self._tasks.append(asyncio.create_task(self._use_codes()))
        self._network.begin(self._cell.step, self._strike)
        self._helper.network.begin()
        if self._worker is not None:
            await until(self._network.hold_wait(), self._victim)
        await self._make(scenario.requests)
        if self._worker is not None:
            await self._handed_over()
            self._network.wake()
        await self._until_quiet(scenario.requests)
        return self._look()

    async def end(self) -> None:
        """Leave nothing but the healthy worker."""
        tasks: list[asyncio.Task[Any]] = [*self._tasks, *self._answers]
        if self._replacing is not None:
            await asyncio.wait([self._replacing])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._lane.relay.scripts.clear()
        await self._lane.end_trial()

    async def _start(self) -> None:
        match self._cell.place.actor:
            case Actor.WORKER:
                await self._helper.freeze()  # until the fault: the requests are the victim's
                self._worker = await self._lane.start_victim()
                self._victim = self._worker.child
            case Actor.CLIENT:
                self._victim, self._ask = await self._lane.start_client()
            case Actor.API:
                self._victim, self._ask = await self._lane.start_api()
        self._network.watchers.append(self._watch)

    async def _make(self, count: int) -> None:
        """Make so many requests at once."""
        if self._ask is not None:
            self._answers = [asyncio.create_task(self._ask(self._email)) for _ in range(count)]
            return
        envelopes = [message({"email": self._email}) for _ in range(count)]
        await self._lane.broker.lpush(QUEUE, *(json.dumps(each) for each in envelopes))
        now = asyncio.get_running_loop().time()
        self._queued |= {each["headers"]["id"]: now for each in envelopes}

    async def _handed_over(self) -> None:
        """Return when a message has woken the worker; if its wait was over before, it will find the message anyway."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BLOCK_TIME):
                while not await self._lane.broker.exists(QUEUE + HANDOVER):  # noqa: ASYNC110 - nothing tells
                    await asyncio.sleep(POLL / 10)

    def _watch(self, frame: Frame) -> None:
        """Note what a client or an API pushes."""
        if (frame.way, frame.name) == (SENT, "push"):
            self._pushes.append(frame)

    def _note_queued(self) -> None:
        """Only a push that passed counts: before a kill or a reset, it may not have."""
        for frame in self._pushes:
            for request_id in _ID.findall(frame.data) if frame.forwarded else ():
                self._queued.setdefault(request_id.decode(), frame.at)

    async def _use_codes(self) -> None:
        """Consume each code as soon as a mail with it has arrived."""
        seen = 0
        while True:
            if len(self._lane.relay.mails) > seen:
                seen = len(self._lane.relay.mails)
                await self._lane.codes.delete(f"code_{self._email}")
            await asyncio.sleep(POLL / 10)

    # The fault

    async def _strike(self, frame: Frame, forward: Callable[[], None]) -> None:
        network, redis_links = self._network, self._network.redis
        self._struck_at = len(network.trace) - 1
        self._in_effect = len(network.trace)
        self._over.clear()
        if self._worker is not None:
            self._worker.forget()
            self._helper.wake()
        match self._cell.fault:
            case Fault.KILLED_BEFORE | Fault.KILLED_AFTER:
                network.hold(network.ports)
                if self._cell.fault is Fault.KILLED_AFTER:
                    forward()
                    await asyncio.sleep(_REACHES)
                await self._victim.kill()
                self._later(0, network.drop)
            case Fault.CUT_SHORT | Fault.CUT_LONG | Fault.TWICE:
                if self._cell.fault is Fault.TWICE:
                    self._helper.network.begin(Step(RELAY, RECEIVED, "content", 1), self._strike_again)
                self._in_effect = self._struck_at
                network.hold(redis_links)
                seconds = SHORT if self._cell.fault is Fault.CUT_SHORT else LONG
                self._later(seconds, lambda: network.release(redis_links))
                await network.moving(frame.link)
                forward()
            case Fault.FROZEN:
                await self._victim.freeze()
                await asyncio.sleep(_REACHES)  # what it wrote before
                self._in_effect = len(network.trace)
                forward()
                self._later(LONG, self._wake)
            case Fault.LOST:
                frame.connection.reset()
                self._later(0, None)

    def _later(self, seconds: float, action: Callable[[], object] | None) -> None:
        """Do this after so many seconds; then the fault is over."""

        async def wait() -> None:
            await asyncio.sleep(seconds)
            done = action() if action is not None else None
            if asyncio.iscoroutine(done):
                await done
            if self._worker is not None:
                self._worker.forget()
            self._over.set()

        self._tasks.append(asyncio.create_task(wait()))

    def _wake(self) -> None:
        self._victim.wake()

    async def _strike_again(self, _frame: Frame, _forward: Callable[[], None]) -> None:
        """Kill the next holder too, just before it reads that its mail was accepted, and start another."""
        network = self._helper.network
        network.hold(network.ports)
        await self._helper.child.kill()
        self._replacing = asyncio.create_task(self._lane.replaced_helper())

    # What is left

    async def _until_quiet(self, count: int) -> None:
        """Wait until all is done: every reply there, nothing in Redis, no fault, and no worker with anything in hand.

        Returns after `_QUIET_WITHIN` seconds at the latest.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + _QUIET_WITHIN
        while not await self._quiet(count):
            if loop.time() > until:
                self._unfinished = True
                return
            await asyncio.sleep(POLL)

    async def _quiet(self, count: int) -> bool:
        if not self._over.is_set():
            return False
        self._note_queued()
        if self._replacing is not None:
            self._helper = await self._replacing
        killed = not self._victim.alive
        if self._ask is not None and not killed and not all(answer.done() for answer in self._answers):
            return False
        workers = [each for each in (self._worker, self._helper) if each is not None and each.child.alive]
        if any(each.holds or not each.rounds for each in workers if not each.frozen):
            return False
        if self._ask is None and len(self._queued) < count:
            return False
        if not all(
            _KEPT.match(key) or b".woken:" in key or b".deaths:" in key for key in await keys_of(self._lane.broker)
        ):
            return False
        stored = [await self._lane.results.exists(META + each) for each in self._queued]
        return all(there or self._lane.heard[each] for each, there in zip(self._queued, stored, strict=True))

    def _look(self) -> Outcome:
        lane = self._lane
        self._note_queued()
        by_reference = {reference(each): each for each in self._queued}
        mails = [Sent(by_reference.get(reference_in(mail), ""), code_in(mail)) for mail in list(lane.relay.mails)]
        asked = []
        with lane.client("results") as results, lane.client("codes") as codes, lane.client("broker") as broker:
            for request_id, at in self._queued.items():
                raw = results.get(META + request_id)
                heard = lane.heard[request_id]
                asked.append(
                    Asked(
                        request_id,
                        stored=None if raw is None else json.loads(raw)["result"]["error"],
                        published=[error for _, error in heard],
                        seconds=heard[0][0] - at if heard else 0.0,
                    )
                )
            code = codes.get(f"code_{self._email}")
            left = held_in(broker)
            left |= {key.decode(): 1 for key in broker.scan_iter() if not _KEPT.match(key) and broker.ttl(key) < 0}
            without_ttl = [key.decode() for client in (codes, results) for key in keys_without_ttl(client)]
            dead = broker.llen("verification.dead")
        processes = [*lane.children, ("the healthy worker", self._helper.child)]
        killed = self._cell.fault is not None and self._cell.fault.kills and self._struck_at is not None
        secrets = [self._email, *(mail.code for mail in mails)]
        outcome = Outcome(
            asked=asked,
            mails=mails,
            trace=list(self._network.trace),
            story=self._story(),
            unfinished=self._unfinished,
            struck_at=self._struck_at,
            in_effect=self._in_effect,
            answers=[answer.result() if answer.done() else None for answer in self._answers],
            left=left,
            without_ttl=without_ttl,
            dead_letters=int(dead),
            codes=set() if code is None else {code.decode()},
            ended=[name for name, child in processes if not child.alive and not (child is self._victim and killed)],
            said=[line for name, child in processes for line in _suspicious(child.log, secrets)],
        )
        longest = max(each.longest for each in (self._worker, self._helper) if each is not None)
        if longest > _STALL:
            outcome.stalled = f"a worker gave no sign of life for {longest:.1f} s"
        return outcome

    def _story(self) -> list[str]:
        """What passed, by time, for people to read."""
        traces = {"victim": self._network.trace, "helper": self._helper.network.trace}
        frames = sorted((frame.at, who, frame) for who, trace in traces.items() for frame in trace)
        first = frames[0][0] if frames else 0.0
        lines = [f"{at - first:7.3f} {who} {frame.link} {label(frame)}" for at, who, frame in frames]
        if self._struck_at is not None:
            lines.append(f"the fault: at {self._network.trace[self._struck_at].at - first:.3f}")
        return lines


def _suspicious(log: str, secrets: list[str]) -> list[str]:
    """The lines of a log that should not be there."""
    found = [line for line in log.splitlines() if any(sign in line for sign in (*BUGS, "Traceback", *secrets))]
    return [line for line in found if not any(each in line for each in _TOLERATED)]
