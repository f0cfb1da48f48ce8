"""What a soak asked, sent and answered, request by request, and whether the promises held.

It takes some hundred bytes a request: mails, replies and logs are read once, as they come, and not kept.
"""

from __future__ import annotations

import base64
import json
import logging
import random
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
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
AFTER: Final = 2.0  # and after it: by then its acceptance is recorded, if nothing is broken
_NEVER: Final = float("inf")


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
    answer: int | None = None  # what the caller was answered
    error: int | None = None  # what was published or stored
    answered_at: float = 0.0
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
        self.dead_least = self.dead_most = 0
        self._active = 0
        self._last_start = self._last_end = -_NEVER
        self._by_id: dict[str, Record] = {}
        self._by_reference: dict[str, Record] = {}
        self._by_email: dict[str, Record] = {}
        self._codes: defaultdict[str, set[int]] = defaultdict(set)
        self._accepted: set[str] = set()
        self._early: dict[str, list[tuple[Mail, float]]] = {}  # by address: mails whose request's id is not known yet
        self._lock = threading.RLock()
        self.began = time.monotonic()

    # Faults

    def begin(self, kind: str, where: str, *, doubts: bool) -> Window:
        """Record that a fault begins."""
        with self._lock:
            window = Window(kind, where, doubts, time.monotonic())
            self.windows.append(window)
            self._active += 1
            self._last_start = window.start
        return window

    def end(self, window: Window) -> None:
        """Record that it is over."""
        with self._lock:
            window.end = self._last_end = time.monotonic()
            self._active -= 1

    def violated(self, what: str, record: Record | None = None) -> None:
        """Record a broken promise."""
        with self._lock:
            self.violations.append(what + (f"\n{self.story(record)}" if record else ""))

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

    def whole(self, mail: Mail) -> None:
        """Record a mail that came whole and was not refused."""
        code = int(code_in(mail))
        now = time.monotonic()
        with self._lock:
            self.mails += 1
            self._codes[mail.recipient].add(code)
            if len(self._codes[mail.recipient]) == 2:
                self.violated(f"two codes for {mail.recipient} within one life")
            record = self._by_reference.get(reference_in(mail))
            if record is not None:
                if record.email != mail.recipient:
                    self.violated(f"a mail to {mail.recipient} in another's name", record)
                record.mails.append(Sent(now, code))
            elif mail.recipient in self._by_email:
                self._early.setdefault(mail.recipient, []).append((mail, now))
            else:
                self.violated(f"a mail to {mail.recipient} that nobody asked for")

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
            if record.error is not None:
                if record.error != error:
                    self.violated(f"a second reply, with error {error}", record)
                return
            record.error, record.answered_at = error, now
            if error == 0 and record.email not in self._accepted:
                self.violated("Success without a mail that a relay accepted", record)
            calm = self._active == 0 and max(self._last_start, self._last_end) < record.at - CALM
            if calm and not stored:
                self.latencies.append(now - record.at)

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

    # At the end

    def check(self) -> None:
        """Check what can only be known when all is over."""
        for record in self.records:
            if record.error is None:
                if record.acknowledged:
                    self.violated("lost: acknowledged, and never answered", record)
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
        meanwhile = set(self._between(record.at, record.answered_at, doubts=False))
        match record.error:
            case 0:
                explained = True
            case 1:
                explained = any("Redis" in each for each in meanwhile)
            case 4:
                explained = record.email.startswith("popular.")
            case 6:
                late = record.answered_at - record.at > self._give_up_after - 1
                explained = late or any(self._between(record.at, record.answered_at, doubts=True))
            case 2:
                explained = sum("worker" in each for each in meanwhile) >= 1
            case _:
                explained = False
        if not explained:
            self.violated(f"answered {record.error} for no reason", record)

    def _check_mails(self, record: Record) -> None:
        if len({mail.code for mail in record.mails}) > 1:
            self.violated("two codes under one id", record)
        # A second mail is permitted if a fault kept the acceptance of the first from being known or recorded.
        first = record.mails[0].at
        doubts = any(self._between(first - BEFORE, first + AFTER, doubts=True))
        if len(record.mails) > 2:
            self.violated(f"{len(record.mails)} mails", record)
        elif len(record.mails) == 2:
            self.doubles["permitted" if doubts else "not permitted"] += 1
            if not doubts:
                self.violated("2 mails, and no fault that permits it", record)
        elif record.error not in {0, 6, None} and not doubts:
            self.violated(f"answered {record.error}, and a mail went out", record)

    def _between(self, start: float, end: float, *, doubts: bool) -> Iterator[str]:
        for window in self.windows:
            if window.start <= end and window.end >= start and (window.doubts or not doubts):
                yield f"{window.kind} {window.where}".strip()

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
            for window in self.windows
            if window.start <= end and window.end >= record.at
        ]
        return "\n".join([*lines, "      meanwhile: " + ("; ".join(faults[:12]) or "nothing")])

    def codes(self) -> set[int]:
        """All codes that were mailed."""
        return set().union(*self._codes.values()) if self._codes else set()

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
        for found in re.findall(rb"\d{12,}", text):
            self._digits.update(int(found[i : i + 12]) for i in range(len(found) - 11))
        self._scan_for_addresses(text, where)
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
