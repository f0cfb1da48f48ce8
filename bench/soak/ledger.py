"""What a soak asked, sent and answered, request by request, and whether the promises held.

It takes about a kilobyte a request: mails, replies and logs are read once, as they come, and not kept.
"""

from __future__ import annotations

import base64
import json
import logging
import random
import re
import threading
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import Final

import redis
from support.caller import META
from support.rig import code_in, reference, reference_in
from support.smtp_server import Mail

KEPT: Final = 3300.0  # seconds for which a stored reply is looked for: it lives for an hour
BATCH: Final = 500  # keys of one MGET
CALM: Final = 3.0  # seconds after a fault that still count as part of it
DECODED: Final = 32_768  # bytes of each part of a log that are also decoded as base64
BEFORE: Final = 1.0  # seconds before a mail came whole in which a fault may concern it
AFTER: Final = 5.0  # and after it: by then its acceptance is recorded, if nothing is broken; a busy machine needs some
ON_THE_WIRE: Final = 30.0  # seconds that a send takes at most: so long, a code may be consumed while it is mailed again
TOLD: Final = 20  # violations of one kind of which the whole story is kept
_NEVER: Final = float("inf")


class Breach(StrEnum):
    """What a violation broke, as the report counts it."""

    LOST = "requests lost"
    NOT_PERMITTED = "second mails, not permitted"
    THIRD = "third mails"
    OTHER_CODE = "second mails with another code"
    TWO_CODES = "addresses with two codes at a time"
    CONSUMED = "codes that worked twice, or were mailed again once consumed"
    STUCK = "replies of 1 that stayed"
    UNEXPLAINED = "other answers without a reason"
    WORKER = "workers that ended by themselves"
    API = "APIs that ended by themselves, or refused a request without an order to end"
    OTHER = "anything else"


@dataclass(slots=True)
class Window:
    """A fault: from when to when, and whether promise 3 permits a second mail for it."""

    kind: str
    where: str
    doubts: bool
    start: float
    end: float = _NEVER


@dataclass(slots=True)
class Sent:
    """A mail that came whole and that the relay did not refuse."""

    at: float
    code: int


@dataclass(slots=True)
class Record:
    """One request. Clients that pick ids themselves give none; no other request then has its address."""

    email: str
    how: str
    at: float
    request_id: str | None = None
    acknowledged: bool = False
    acknowledged_at: float = 0.0
    answer: int | None = None  # what the caller was answered
    error: int | None = None  # what was published or stored
    answered_at: float = 0.0
    ones: int = 0  # replies of 1 after which it was asked again
    again_at: float = 0.0  # when it was asked again last
    hung_up: bool = False  # the connection of the first mail ended after its final dot, before anything else was said
    logged_ones: int = 0  # how many a worker's log tells of
    mails: list[Sent] = field(default_factory=list)


class Ledger:
    """The record of a soak; any thread may write to it."""

    def __init__(self, give_up_after: float) -> None:
        """`give_up_after`: seconds after which error 6 needs no other reason."""
        self._give_up_after = give_up_after
        self.windows: list[Window] = []
        self.records: list[Record] = []
        self.violations: list[str] = []
        self.latencies: list[float] = []
        self.mails = 0
        self.doubles: Counter[str] = Counter()
        self.breaches: Counter[Breach] = Counter()
        self._told: Counter[str] = Counter()  # violations whose story is kept, by kind
        self.refused: Counter[str] = Counter()  # requests that an API which was told to end refused, or cut off
        self.checks: Counter[str] = Counter()  # checks of codes, by answer
        self.unanswered_dots = 0  # permitted second mails for which the connection's end is the only reason
        self.unheard = 0  # replies of 1 that only a worker's log tells of
        # What a mail or a reply of 1 leads to: an end user who checks the code, a caller who asks again.
        self.on_mail: Callable[[str, int], object] = lambda _email, _code: None
        self.on_redis_err: Callable[[Record], object] = lambda _record: None
        self.dead_least = self.dead_most = 0
        self._open: list[Window] = []
        self._last_start = self._last_end = -_NEVER
        self._by_id: dict[str, Record] = {}
        self._by_reference: dict[str, Record] = {}
        self._by_email: dict[str, Record] = {}
        self._codes: dict[str, tuple[int, ...]] = {}  # by address: those that were mailed
        self._claimed: defaultdict[str, set[int]] = defaultdict(set)  # by address: those that are checked, or were
        self._consumed: dict[tuple[str, int], float] = {}  # when
        self._starts: list[float] = []  # of the windows
        self._longest = 0.0  # seconds of a window
        self._accepted: set[str] = set()
        self._early: dict[str, list[tuple[Mail, float]]] = {}  # by address: mails whose request's id is not known yet
        self._hung_up_early: set[str] = set()
        self._reused: Counter[str] = Counter()  # ids that were pushed with another address
        self._lock = threading.RLock()
        self.began = time.monotonic()

    # Faults

    def begin(self, kind: str, where: str, *, doubts: bool) -> Window:
        """Record that a fault begins."""
        with self._lock:
            window = Window(kind, where, doubts, time.monotonic())
            self.windows.append(window)
            self._starts.append(window.start)
            self._open.append(window)
            self._last_start = window.start
        return window

    def end(self, window: Window) -> None:
        """Record that it is over."""
        with self._lock:
            window.end = self._last_end = time.monotonic()
            self._longest = max(self._longest, window.end - window.start)
            self._open.remove(window)

    def stalled(self, since: float) -> None:
        """Record that the machine ran nothing from `since` until now: a lease may have run out."""
        with self._lock:
            window = Window("machine: stalled", "", True, since, time.monotonic())
            at = bisect_left(self._starts, since)
            self.windows.insert(at, window)
            self._starts.insert(at, since)
            self._longest = max(self._longest, window.end - window.start)
            self._last_end = max(self._last_end, window.end)

    def ordered(self, where: str, since: float) -> bool:
        """Whether a fault ended this process, or was under way there, since then."""
        return any(
            each.where == where and "API" in each.kind for each in self._windows_between(since, time.monotonic())
        )

    def violated(self, what: str, record: Record | None = None, *, breach: Breach = Breach.OTHER) -> None:
        """Record a broken promise."""
        with self._lock:
            self.breaches[breach] += 1
            if record is not None:
                self._told[what] += 1
                what += f"\n{self.story(record)}" if self._told[what] <= TOLD else ""
            self.violations.append(what)

    # Requests

    def asking(self, email: str, how: str, request_id: str | None = None) -> Record:
        """Record that a caller is about to ask."""
        record = Record(email, how, time.monotonic(), request_id)
        with self._lock:
            self.records.append(record)
            if request_id is None:
                self._by_email[email] = record
            else:
                self._know(record, request_id)
        return record

    def _know(self, record: Record, request_id: str) -> None:
        record.request_id = request_id
        self._by_id[request_id] = record
        self._by_reference[reference(request_id)] = record
        for mail, at in self._early.pop(record.email, ()):
            if reference_in(mail) != reference(request_id):
                self.violated(f"a mail to {mail.recipient} that nobody asked for", record)
            record.mails.append(Sent(at, int(code_in(mail))))
        record.hung_up = record.email in self._hung_up_early

    def whole(self, mail: Mail) -> None:
        """Record a mail that came whole and was not refused."""
        code = int(code_in(mail))
        now = time.monotonic()
        with self._lock:
            self.mails += 1
            self._judge_code(mail.recipient, code, now)
            record = self._by_reference.get(reference_in(mail))
            if record is not None:
                if record.email != mail.recipient:
                    self.violated(f"a mail to {mail.recipient} in another's name", record)
                record.mails.append(Sent(now, code))
            elif mail.recipient in self._by_email:
                self._early.setdefault(mail.recipient, []).append((mail, now))
            else:
                self.violated(f"a mail to {mail.recipient} that nobody asked for")
        self.on_mail(mail.recipient, code)

    def _judge_code(self, email: str, code: int, now: float) -> None:
        codes = self._codes.get(email, ())
        if code not in codes:
            self._codes[email] = codes = (*codes, code)
            if len(codes) > 1 + len(self._claimed.get(email, ())):  # a new code follows a consumed one
                self.violated(f"two codes for {email} within one life", breach=Breach.TWO_CODES)
        elif now - self._consumed.get((email, code), now) > ON_THE_WIRE:
            self.violated(f"a consumed code was mailed again to {email}", breach=Breach.CONSUMED)

    # Checks

    def claim(self, email: str, code: int) -> bool:
        """Whether the caller may check this code; from now on nobody else may, and it may be consumed."""
        with self._lock:
            if code in self._claimed[email]:
                return False
            self._claimed[email].add(code)
            return True

    def checked(self, email: str, code: int, error: int, *, first: bool) -> None:
        """Record a check of a mailed code. `first`: no earlier check can have consumed it."""
        with self._lock:
            self.checks[str(error)] += 1
            if error == 0:
                if (email, code) in self._consumed:
                    self.violated(f"a code of {email} worked twice", breach=Breach.CONSUMED)
                self._consumed[email, code] = time.monotonic()
            elif error != 1 and first:
                self.violated(f"a check of the right code of {email} was answered {error}", self._by_email.get(email))

    def hung_up(self, mail: Mail) -> None:
        """Record that a connection ended after the final dot of this mail: its sender may not know the answer."""
        with self._lock:
            record = self._by_reference.get(reference_in(mail))
            if record is not None:
                record.hung_up = record.hung_up or len(record.mails) == 1
            elif mail.recipient in self._early:
                self._hung_up_early.add(mail.recipient)

    def accepted(self, mail: Mail) -> None:
        """Record that the relay is about to answer 250."""
        with self._lock:
            self._accepted.add(mail.recipient)

    def replied(self, channel: str, data: bytes, *, stored: bool = False) -> None:
        """Record a reply that was published, or found stored."""
        request_id = channel.removeprefix(META)
        meta = json.loads(data)
        email, error = meta["result"]["email"], meta["result"]["error"]
        now = time.monotonic()
        with self._lock:
            record = self._by_id.get(request_id)
            if record is None:
                record = self._by_email.get(email)
                if record is None or record.request_id is not None:
                    self.violated(f"a reply to {request_id}, which nobody asked")
                    return
                self._know(record, request_id)
            if meta["status"] != "SUCCESS" or email != record.email:
                self.violated(f"a reply with status {meta['status']} and address {email}", record)
            if stored and error == 1:
                self.violated("a reply of 1 is stored", record, breach=Breach.STUCK)
            if record.error == 1 or error == 1:
                self._replied_one(record, error, now)
                return
            if record.error is not None:
                if record.error != error:
                    self.violated(f"a second reply, with error {error}", record)
                return
            record.error, record.answered_at = error, now
            if error == 0 and record.email not in self._accepted:
                self.violated("Success without a mail that a relay accepted", record)
            calm = not self._open and max(self._last_start, self._last_end) < record.at - CALM
            if calm and not stored:
                self.latencies.append(now - record.at)

    def _replied_one(self, record: Record, error: int, now: float) -> None:
        """Take a reply of 1, or one that follows it. A reply of 1 is not final: asked again, the request is served."""
        if error != 1:  # redelivered, because the worker could not ack the message that it answered
            record.error, record.answered_at = error, now
            return
        if record.error is not None:
            if record.error != 1 and not self._redis_failed(record.at, now):
                self.violated(f"a reply of 1 after one of {record.error}", record)
            return
        record.error, record.answered_at = 1, now
        if record.ones and not self._redis_failed(record.again_at, now):
            self.violated("asked again after a reply of 1, and answered 1 for no reason", record, breach=Breach.STUCK)
            return
        self.on_redis_err(record)

    def _redis_failed(self, start: float, end: float) -> bool:
        return any("Redis" in each for each in self._between(start, end, doubts=False))

    def ask_again(self, record: Record) -> bool:
        """Record that a caller is about to ask once more under the id of a request; False if it was served since."""
        with self._lock:
            if record.error != 1:
                return False
            record.ones += 1
            record.error, record.again_at = None, time.monotonic()
            return True

    def logged_redis_err(self, request_id: str) -> None:
        """Record that a worker's log tells of a reply of 1: nobody may have heard it, and it is not stored."""
        with self._lock:
            record = self._by_id.get(request_id)
            if record is None:
                return
            if self._reused[request_id]:
                self._reused[request_id] -= 1
                self.dead_least -= 1
            record.logged_ones += 1
            if record.error is None and record.logged_ones > record.ones:
                self.unheard += 1
                record.error, record.answered_at = 1, time.monotonic()
                self.on_redis_err(record)

    def read_stored(self, results: redis.Redis, keys: Iterable[str]) -> None:
        """Record the replies that are stored under these keys."""
        remaining = iter(keys)
        while batch := list(islice(remaining, BATCH)):
            for key, data in zip(batch, results.mget(batch), strict=True):
                if isinstance(data, bytes):
                    self.replied(key, data, stored=True)

    def read_missing(self, results: redis.Redis) -> None:
        """Record the stored replies to requests of which none was heard: faults break the listener's connection too."""
        self.read_stored(results, [META + each.request_id for each in self.unanswered() if each.request_id])

    def unanswered(self) -> list[Record]:
        """Acknowledged requests without a reply so far."""
        with self._lock:
            return [record for record in self.records if record.acknowledged and record.error is None]

    def some_answered(self, count: int, chance: random.Random) -> list[Record]:
        """Some requests of the last minutes that were answered Success."""
        with self._lock:
            recent = [record for record in self.records[-3000:] if record.error == 0 and record.request_id]
        return chance.sample(recent, min(count, len(recent)))

    def expect_dead(self, least: int, most: int) -> None:
        """Expect so many more dead letters."""
        with self._lock:
            self.dead_least += least
            self.dead_most += most

    def reuse(self, record: Record) -> None:
        """Record that its id is pushed with another address: a dead letter, or answered 1 if the store cannot tell."""
        assert record.request_id is not None
        with self._lock:
            self._reused[record.request_id] += 1

    # At the end

    def check(self) -> None:
        """Check what can only be known when all is over."""
        for record in self.records:
            if record.error is None:
                if record.acknowledged:
                    self.violated("lost: acknowledged, and never answered", record, breach=Breach.LOST)
                elif record.mails:
                    self.violated("a mail, and no reply", record)
            elif record.answer not in {None, record.error, 1, 6}:
                self.violated(f"the caller was answered {record.answer}", record)
            else:
                self._check_error(record)
            if record.mails:
                self._check_mails(record)

    def _check_error(self, record: Record) -> None:
        """Check that something happened that explains the answer."""
        if record.error == 0:
            return
        meanwhile = set(self._between(record.at, record.answered_at, doubts=False))
        match record.error:
            case 1:
                explained = any("Redis" in each for each in meanwhile)
            case 4:
                explained = record.email.startswith("popular.")
            case 6:
                late = record.answered_at - record.at > self._give_up_after - 1
                doubted = record.hung_up or any(self._between(record.at, record.answered_at, doubts=True))
                explained = late or doubted
            case 2:
                explained = sum("worker" in each for each in meanwhile) >= 1
            case _:
                explained = False
        if not explained:
            self.violated(f"answered {record.error} for no reason", record, breach=Breach.UNEXPLAINED)

    def _check_mails(self, record: Record) -> None:
        if len({mail.code for mail in record.mails}) > 1:
            self.violated("two codes under one id", record, breach=Breach.OTHER_CODE)
        # A second mail is permitted if a fault kept the acceptance of the first from being known or recorded.
        first = record.mails[0].at
        faults = any(self._between(first - BEFORE, first + AFTER, doubts=True))
        doubts = faults or record.hung_up
        if len(record.mails) > 2:
            self.violated(f"{len(record.mails)} mails", record, breach=Breach.THIRD)
        elif len(record.mails) == 2:
            self.doubles["permitted" if doubts else "not permitted"] += 1
            self.unanswered_dots += doubts and not faults
            if not doubts:
                self.violated("2 mails, and no fault that permits it", record, breach=Breach.NOT_PERMITTED)
        elif record.error not in {0, 6, None} and not doubts:
            self.violated(f"answered {record.error}, and a mail went out", record)

    def _between(self, start: float, end: float, *, doubts: bool) -> Iterator[str]:
        for window in self._windows_between(start, end):
            if window.doubts or not doubts:
                yield f"{window.kind} {window.where}".strip()

    def _windows_between(self, start: float, end: float) -> list[Window]:
        with self._lock:
            # Those that are over began within the longest one's time; the others are the last ones.
            longest = max([self._longest, *(time.monotonic() - each.start for each in self._open)])
            first, last = bisect_left(self._starts, start - longest), bisect_left(self._starts, end + 1e-9)
            return [window for window in self.windows[first:last] if window.end >= start]

    def story(self, record: Record) -> str:
        """What happened to a request, for people to read."""
        zero = self.began
        lines = [f"    {record.request_id} {record.email} by {record.how}, asked at {record.at - zero:.2f} s"]
        lines[0] += "" if record.acknowledged else ", not acknowledged"
        lines += [f"      mail at {mail.at - zero:.2f} s" for mail in record.mails]
        if record.error is not None:
            lines.append(f"      answered {record.error} at {record.answered_at - zero:.2f} s")
        end = max([record.answered_at or time.monotonic(), *(mail.at for mail in record.mails)])
        faults = [
            f"{window.kind} {window.where} {window.start - zero:.1f}-{window.end - zero:.1f} s"
            for window in self._windows_between(record.at, end)
        ]
        return "\n".join([*lines, "      meanwhile: " + ("; ".join(faults[:12]) or "nothing")])

    def codes(self) -> set[int]:
        """All codes that were mailed."""
        return {code for codes in self._codes.values() for code in codes}

    def outcomes(self) -> Counter[str]:
        """How many requests ended how."""
        counts: Counter[str] = Counter()
        for record in self.records:
            unknown = "none" if record.acknowledged else "never queued (the caller got RedisErr)"
            counts[unknown if record.error is None else str(record.error)] += 1
        return counts


class Scanner(logging.Handler):
    """Searches workers' logs, events and, as a log handler, clients' logs for codes and addresses."""

    SIGNS: Final = (b"AttributeError", b"unexpected error", b"never retrieved", b"Unrecoverable")
    _REDIS_ERR: Final = re.compile(rb"^.*\bRedisErr\b.*$", re.MULTILINE)
    _ID: Final = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
    _ADDRESS: Final = re.compile(rb"(?:[\w.+-]+@soak\.example|poison@example\.com)\b[^\n]*")

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger
        self._digits: set[int] = set()  # possible codes; which are codes is known when all mails have come
        self.bytes = 0
        self._addresses_seen = 0

    def scan(self, text: bytes, where: str) -> None:
        """Search whole lines."""
        self.bytes += len(text)
        # Not the fractions of numbers: in the times of an hour's events, some digits are a code by chance.
        for found in re.findall(rb"(?<![\d.])\d{12,}", text):
            self._digits.update(int(found[i : i + 12]) for i in range(len(found) - 11))
        self._scan_for_addresses(text, where)
        if b"RedisErr" in text:
            for line in self._REDIS_ERR.findall(text):
                if b"request answered" in line and (found := self._ID.search(line)):
                    self._ledger.logged_redis_err(found[0].decode())
        for sign in self.SIGNS:
            if (at := text.find(sign)) >= 0:
                self._ledger.violated(f"{sign.decode()} in {where}:\n{text[max(0, at - 1500) : at + 1500].decode()}")
        # A sample is also decoded as base64.
        for run in set(re.findall(rb"[A-Za-z0-9+/]{16,}", text[:DECODED])):
            for start in range(4):
                plain = base64.b64decode(run[start : start + (len(run) - start) // 4 * 4])
                self._digits.update(int(found) for found in re.findall(rb"\d{12}", plain))
                self._scan_for_addresses(plain, f"{where}, in base64")

    def emit(self, record: logging.LogRecord) -> None:
        """Search a line of a client's log."""
        self.scan(self.format(record).encode(), "a client's log")

    def scan_event(self, data: bytes) -> None:
        """Search one of Celery's events."""
        self.scan(base64.b64decode(json.loads(data)["body"]), "an event")

    def _scan_for_addresses(self, text: bytes, where: str) -> None:
        found = self._ADDRESS.search(text)
        if found:
            self._addresses_seen += 1
            if self._addresses_seen <= 5:
                self._ledger.violated(f"a whole address in {where}: {found[0][:200]!r}")

    def check(self, codes: Iterable[int]) -> None:
        """Record a violation if a code was in what was searched."""
        if leaked := self._digits.intersection(codes):
            self._ledger.violated(f"{len(leaked)} codes in logs or events: {sorted(leaked)[:5]}")
