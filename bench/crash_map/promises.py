"""What became of a cell's requests, and which promises that breaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from bench.crash_map.network import RECEIVED, RELAY, SENT, Frame
from bench.crash_map.scenarios import GIVE_UP_AFTER, LEASE, SCENARIOS, Actor, Cell, Fault
from producer.contract import ErrorCode

_MOST: Final = 2  # mails of one request, whatever happens
_REDIS_AWAY: Final = {Fault.CUT_SHORT, Fault.CUT_LONG, Fault.FROZEN, Fault.LOST, Fault.TWICE}


@dataclass(slots=True)
class Sent:
    """A mail that the relay accepted, whether the worker got to know it or not."""

    request_id: str
    code: str


@dataclass(slots=True)
class Asked:
    """A request that Redis has got."""

    request_id: str
    stored: int | None = None  # the error of the stored reply
    published: list[int] = field(default_factory=list)
    seconds: float = 0.0  # from the request to its reply

    @property
    def error(self) -> int | None:
        """The reply; None: there is none."""
        return self.published[-1] if self.stored is None and self.published else self.stored


@dataclass(slots=True)
class Outcome:
    """What a cell leaves."""

    asked: list[Asked] = field(default_factory=list)
    mails: list[Sent] = field(default_factory=list)
    trace: list[Frame] = field(default_factory=list)
    story: list[str] = field(default_factory=list)  # what passed, for people to read
    struck_at: int | None = None  # index of the step in the trace; None: it did not occur
    in_effect: int = 0  # how many frames the process had sent or got when the fault took effect
    answers: list[int | None] = field(default_factory=list)  # what callers of the client or the API got; None: nothing
    left: dict[str, int] = field(default_factory=dict)  # requests that are still somewhere in the broker database
    without_ttl: list[str] = field(default_factory=list)
    dead_letters: int = 0
    codes: set[str] = field(default_factory=set)  # live ones, at the end
    ended: list[str] = field(default_factory=list)  # processes that no fault ended
    said: list[str] = field(default_factory=list)  # lines of their logs that should not be there
    unfinished: bool = False  # not all was quiet in time
    stalled: str = ""  # why this run says nothing: the machine was too busy


def breaches(cell: Cell, outcome: Outcome) -> list[str]:
    """The promises that were not kept, in words."""
    return [*_replies(cell, outcome), *_mails(cell, outcome), *_answers(cell, outcome), *_rest(outcome)]


def _replies(cell: Cell, outcome: Outcome) -> Iterator[str]:
    for each in outcome.asked:
        # 1 is not final: it is published, and the same request may be served later.
        final = {error for error in (each.stored, *each.published) if error not in {None, ErrorCode.REDIS_ERR}}
        if len(final) > 1:
            yield f"different replies to one request: {final}"
        match each.error:
            case ErrorCode.SUCCESS:
                if not outcome.mails:
                    yield "a reply of 0, and no relay accepted a mail"
            case ErrorCode.REDIS_ERR if cell.fault in _REDIS_AWAY:
                pass
            case ErrorCode.TIMEOUT if each.seconds > GIVE_UP_AFTER - 1 or _may_be_unknown(cell):
                pass
            case None:
                yield "lost: Redis had the request, and it has no reply"
            case error:
                yield f"a reply of {error} after {each.seconds:.1f} s"


def _may_be_unknown(cell: Cell) -> bool:
    """Whether 6 may be said before the deadline: the code is gone, or acceptance is unknown twice."""
    return SCENARIOS[cell.place.scenario].consumed or cell.fault is Fault.TWICE


def _mails(cell: Cell, outcome: Outcome) -> Iterator[str]:
    by_request = Counter(mail.request_id for mail in outcome.mails)
    if unknown := set(by_request) - {each.request_id for each in outcome.asked}:
        yield f"{len(unknown)} mails that nobody asked for"
    doubts = doubts_of(cell, outcome)
    if len(outcome.mails) > 1 + doubts:
        yield f"{len(outcome.mails)} mails, and {'nothing permits' if not doubts else 'one fault permits'} so many"
    if max(by_request.values(), default=0) > _MOST:
        yield f"{max(by_request.values())} mails of one request"
    if len({mail.code for mail in outcome.mails}) > 1:
        yield "mails with different codes"


def doubts_of(cell: Cell, outcome: Outcome) -> int:
    """How many mails there are of which it cannot be known, or could not be recorded, that a relay accepted them.

    By promise 3 each of them permits one more mail to the address, but no third one of one request.
    """
    if cell.place.actor is not Actor.WORKER or outcome.struck_at is None:
        return 0
    at = outcome.trace[outcome.struck_at]
    before = [frame for frame in outcome.trace[: outcome.in_effect] if frame.forwarded]
    contents = _count(before, SENT, "content")
    match cell.fault:
        case Fault.KILLED_BEFORE | Fault.KILLED_AFTER:
            pass
        case Fault.FROZEN:
            # With both answers there, it may have been just about to write.
            contents = max(contents, min(_count(before, RECEIVED, name) for name in ("DATA", "announce_data")))
        case Fault.CUT_LONG | Fault.TWICE:
            # What Redis had allowed before, the worker may still send while it has the lease.
            contents = _count([frame for frame in outcome.trace if frame.at < at.at + LEASE], SENT, "content")
        case Fault.LOST if at.link == RELAY:
            contents = _count([*before, at], SENT, "content")
        case _:
            return 0
    # A retry's first mail was refused, and that is recorded: each mark belongs to one content before it.
    in_doubt = int(contents > _count(before, SENT, "settle"))
    # The next holder is killed before it reads that its mail was accepted.
    return in_doubt + 1 if cell.fault is Fault.TWICE else in_doubt


def _count(frames: list[Frame], way: str, name: str) -> int:
    return sum((frame.way, frame.name) == (way, name) for frame in frames)


def _answers(cell: Cell, outcome: Outcome) -> Iterator[str]:
    """What the callers of a client or an API got."""
    known = {each.error for each in outcome.asked}
    for answer in outcome.answers:
        if answer is None:
            if cell.fault is None or not (cell.fault.kills or cell.place.actor is Actor.API):
                yield "a caller got no answer"
        elif answer not in known and (cell.fault is None or answer not in {1, 6}):
            yield f"a caller was answered {answer}"


def _rest(outcome: Outcome) -> Iterator[str]:
    if outcome.unfinished:
        yield "something was still under way long after the deadline"
    for where, count in outcome.left.items():
        yield f"{count} left in {where}"
    for key in outcome.without_ttl:
        yield f"no TTL: {key}"
    if outcome.dead_letters:
        yield f"{outcome.dead_letters} dead letters"
    if len(outcome.codes) > 1 or (outcome.codes and {mail.code for mail in outcome.mails} - outcome.codes):
        yield "the live code is not the one in the mail"
    for name in outcome.ended:
        yield f"{name} has ended"
    for line in outcome.said:
        yield f"in a log: {line}"
