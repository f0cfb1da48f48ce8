"""Removes everything about one address from the three databases, while callers and workers go on.

It never holds Redis up: it scans and deletes keys, and reads lists, a few at a time. Things move meanwhile, so it goes
round until it finds nothing more.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, cast

from redis import Redis

from producer import address
from producer.contract import DEAD_LETTERS, DEFAULT_PURPOSE, REPLY_KEY_PREFIX, ErrorCode, reply_key
from producer.errors import InvalidAddress
from producer.redis.scripts import Script
from producer.store.backlog import DELAYED, SUSPECTS
from producer.store.codes import Claim
from producer.store.redis_codes import ATTEMPTS, BUCKET, COOLDOWN, JOINED, REQUEST, SENDING, SUPPRESSED, WRONG
from worker.job import Job
from worker.queue.commands import DUE, PRIORITY_SEPARATOR, PRIORITY_STEPS, READY, UNACKED
from worker.queue.dead_letters import DeadLetter
from worker.queue.message import UnfitMessage, read_job
from worker.settler import reply_payload

_FORGET: Final = Script(Path(__file__).parent / "queue" / "forget.lua")

STEP: Final = 500  # keys of one SCAN, and of one pipeline
PAGE: Final = 50  # entries of a list read at once, each of up to 64 kB
ROUNDS: Final = 5  # at most
PAUSE: Final = 0.2  # seconds between two looks at what workers hold

CODES, SIDE_KEYS, RECORDS, REPLIES = "codes", "counts and limits", "request records", "replies"
QUEUED, DELAYED_REQUESTS, DEAD, HELD = "queued requests", "delayed requests", "dead letters", "requests in hand"
KINDS: Final = (QUEUED, DELAYED_REQUESTS, DEAD, CODES, SIDE_KEYS, RECORDS, REPLIES)

_BASE64: Final = re.compile(r"[A-Za-z0-9+/]{16,}")
_ADDRESS: Final = re.compile(r"[^\s\"<>,;:()\[\]\\@]+@[^\s\"<>,;:()\[\]\\@{}']+")
_ESCAPE: Final = re.compile(r"\\u([0-9a-fA-F]{4})")
_HELD_ENTRY: Final = re.compile(rb'\[(.*),\s*"[^"]*",\s*"([^"]*)"\]', re.DOTALL)  # kombu's: message, exchange, queue


@dataclass
class Erased:
    """What was removed, by kind, and what could not be."""

    removed: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)


class Eraser:
    """Erases one address, in every spelling that has the same canonical form. Methods raise `redis.RedisError`."""

    def __init__(
        self, codes: Redis, broker: Redis, results: Redis, *, queue: str, email: str, fold_aliases: bool
    ) -> None:
        """`email`: if it is not an address, only what was stored under this very text is erased."""
        self._codes, self._broker, self._results = codes, broker, results
        self._queue = queue
        self._canonical = _canonical(email)
        folded = fold_aliases and "@" in self._canonical
        self._mailbox = address.fold_aliases(self._canonical) if folded else self._canonical  # its buckets' name
        self._spellings = {email, self._canonical}
        self._purposes = {DEFAULT_PURPOSE}
        self._ids: set[str] = set()  # of requests for the address
        self._held: set[str] = set()  # ids of those that a worker still holds
        self._known: dict[str, bool] = {}  # by text: whether it is the address; many keys hold the same text

    def erase(self, *, wait: float) -> Erased:
        """Remove everything. `wait`: seconds for workers to finish what they hold of it."""
        done = Erased()
        until = time.monotonic() + wait
        for _ in range(ROUNDS):
            removed = self._from_broker()
            held = self._wait_for_workers(until)
            removed += self._from_results()
            removed += self._from_codes()
            done.removed += removed
            done.left = Counter({HELD: held}) if held else Counter()
            if not removed:
                return done
        done.left["found anew in each round"] = removed.total()
        return done

    # The broker

    def _from_broker(self) -> Counter[str]:
        queue = self._queue
        lists = [queue, *(f"{queue}{PRIORITY_SEPARATOR}{step}" for step in PRIORITY_STEPS), queue + SUSPECTS]
        removed: Counter[str] = Counter()
        for key in lists:
            removed[QUEUED] += self._from_list(key, self._concerns)
        removed[DEAD] += self._from_list(DEAD_LETTERS, self._is_in_letter)
        removed[DELAYED_REQUESTS] += self._from_delayed()
        return +removed

    def _from_list(self, key: str, concerns: Callable[[bytes], bool]) -> int:
        """Remove entries, from the oldest on. Pages overlap: workers take from either end meanwhile."""
        removed, start = 0, 1
        while page := self._broker.lrange(key, -(start + PAGE - 1), -start):
            gone = 0
            for entry in {entry for entry in cast(list[bytes], page) if concerns(entry)}:
                count = int(self._broker.lrem(key, 0, entry))  # type: ignore[arg-type]  # bytes are fine
                gone += count
                if count and key != DEAD_LETTERS:
                    self._answer(entry)
            removed += gone
            start = max(1, start + PAGE // 2 - gone)
        return removed

    def _from_delayed(self) -> int:
        removed = 0
        forget = self._broker.register_script(_FORGET.text)
        delayed = self._queue + DELAYED
        keys = [delayed, self._queue + DUE, self._queue + READY]
        for name, entry in self._broker.hscan_iter(delayed, count=PAGE):
            message = entry.partition(b" ")[2] or entry  # another release may have written it otherwise
            if self._concerns(message) and forget(keys, [name, entry]):
                removed += 1
                self._answer(message)
        return removed

    def _wait_for_workers(self, until: float) -> int:
        """How many requests for the address workers still hold at the end."""
        while True:
            self._held = set()
            count = 0
            for _, entry in self._broker.hscan_iter(UNACKED, count=PAGE):
                found = _HELD_ENTRY.fullmatch(entry)
                message, queue = found.groups() if found else (entry, self._queue.encode())
                if queue == self._queue.encode() and self._concerns(message):
                    count += 1
                    if (job := _job(message)) is not None:
                        self._held.add(job.request_id)
            if not count or time.monotonic() >= until:
                return count
            time.sleep(PAUSE)

    def _answer(self, message: bytes) -> None:
        """Answer 6 to the caller of a removed request. It is published only: a stored reply would hold the address."""
        if (job := _job(message)) is not None:
            now = datetime.now(UTC).isoformat()
            self._results.publish(reply_key(job.request_id), reply_payload(job, ErrorCode.TIMEOUT, now))

    # The results and the codes

    def _from_results(self) -> Counter[str]:
        removed: Counter[str] = Counter()
        for keys in _pages(self._results.scan_iter(f"{REPLY_KEY_PREFIX}*", count=STEP)):
            pipeline = self._results.pipeline(transaction=False)
            for key in keys:
                pipeline.get(key)
            found = []
            for key, value in zip(keys, pipeline.execute(raise_on_error=False), strict=True):
                request_id = _text(key).removeprefix(REPLY_KEY_PREFIX)
                if self._is_in_text(request_id) or (isinstance(value, bytes) and self._is_in_reply(value)):
                    self._ids.add(request_id)
                    found.append(key)
            removed[REPLIES] += _delete(self._results, found)
        return +removed

    def _from_codes(self) -> Counter[str]:
        """Codes and side keys first, because their names tell the purposes; then records, which hold only a hash."""
        removed: Counter[str] = Counter()
        records: list[Any] = []
        kept = {prefix for prefix in (SENDING, JOINED) if self._held}
        for keys in _pages(self._codes.scan_iter(count=STEP)):
            found: dict[str, list[Any]] = {CODES: [], SIDE_KEYS: []}
            for key in keys:
                name = _text(key)
                if name.startswith(REQUEST):
                    continue
                kind = self._kind(name)
                if kind is not None and not any(name.startswith(prefix) for prefix in kept):
                    found[kind].append(key)
            for kind, each in found.items():
                removed[kind] += _delete(self._codes, each)
        whos = {Claim.of("", "", email, purpose, "").who for email in self._spellings for purpose in self._purposes}
        for keys in _pages(self._codes.scan_iter(f"{REQUEST}*", count=STEP)):
            pipeline = self._codes.pipeline(transaction=False)
            for key in keys:
                pipeline.hget(key, "who")
            for key, who in zip(keys, pipeline.execute(raise_on_error=False), strict=True):
                request_id = _text(key).removeprefix(REQUEST)
                ours = isinstance(who, bytes) and _text(who) in whos
                if (ours or request_id in self._ids or self._is_in_text(request_id)) and request_id not in self._held:
                    records.append(key)
        removed[RECORDS] += _delete(self._codes, records)
        return +removed

    def _kind(self, name: str) -> str | None:
        """The kind of a key in the codes database; None if it is not about the address."""
        for prefix in (ATTEMPTS, COOLDOWN, SENDING, JOINED):
            if name.startswith(prefix):
                return SIDE_KEYS if self._is_code_key(name.removeprefix(prefix)) else None
        if name.startswith(BUCKET):
            rest = name.removeprefix(BUCKET)
            return SIDE_KEYS if self._mailbox in {rest, rest.rpartition(":")[0]} else None
        if name.startswith(SUPPRESSED):
            return SIDE_KEYS if self._is_address(name.removeprefix(SUPPRESSED)) else None
        if name.startswith(WRONG):
            return SIDE_KEYS if self._is_address(name.removeprefix(WRONG).partition(":")[2]) else None
        return CODES if self._is_code_key(name) else None

    def _is_code_key(self, name: str) -> bool:
        if name.startswith("code_"):
            return self._is_address(name.removeprefix("code_"))
        if name.startswith("code:"):
            purpose, _, email = name.removeprefix("code:").partition(":")
            if self._is_address(email):
                self._purposes.add(purpose)
                return True
        return False

    # Whether something is about the address

    def _is_address(self, text: object) -> bool:
        if not isinstance(text, str):
            return False
        known = self._known.get(text)
        if known is None:
            known = text in self._spellings or _canonical(text) == self._canonical
            if known:
                self._spellings.add(text)
            if len(self._known) >= STEP:
                self._known.clear()
            self._known[text] = known
        return known

    def _is_in_email(self, email: object) -> bool:
        """Whether what a caller gave as an email is the address, or has it somewhere."""
        if isinstance(email, str):
            return self._is_address(email) or self._is_in_text(email)
        return self._is_in_text(json.dumps(email, ensure_ascii=False))

    def _concerns(self, message: bytes) -> bool:
        """Whether a message asks for the address or, if it cannot be read, has it anywhere."""
        job = _job(message)
        if job is None:
            return self._is_in_raw(message)
        if not self._is_in_email(job.request.email) and not self._is_in_text(job.request_id):
            return False
        self._ids.add(job.request_id)
        if isinstance(job.request.purpose, str):
            self._purposes.add(job.request.purpose)
        return True

    def _is_in_letter(self, entry: bytes) -> bool:
        return self._concerns(DeadLetter.of(entry).message) or self._is_in_raw(entry)

    def _is_in_reply(self, value: bytes) -> bool:
        try:
            return self._is_in_email(json.loads(value)["result"]["email"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return self._is_in_raw(value)

    def _is_in_raw(self, raw: bytes) -> bool:
        """Whether the address is in `raw`, as text or in base64, which may be cut off."""
        text = raw.decode("utf-8", "replace").replace(r"\/", "/")  # as some programs write JSON, in base64 too
        if self._is_in_text(text):
            return True
        for run in _BASE64.findall(text):
            decoded = base64.b64decode(run[: len(run) // 4 * 4]).decode("utf-8", "replace")
            if self._is_in_text(decoded):
                return True
        return False

    def _is_in_text(self, text: str) -> bool:
        if "@" not in text:
            return text == self._canonical
        plain = _ESCAPE.sub(lambda found: chr(int(found[1], 16)), text)
        plain = plain.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # two escapes can be one character
        return any(self._is_address(each.strip("'")) for each in _ADDRESS.findall(plain))


def _canonical(email: str) -> str:
    try:
        return address.parse(email).canonical
    except InvalidAddress:
        return email


def _job(message: bytes) -> Job | None:
    """The request in a message; None if it cannot be read."""
    try:
        return read_job(message)
    except UnfitMessage:
        return None


def _text(raw: Any) -> str:
    return raw.decode("utf-8", "surrogateescape") if isinstance(raw, bytes) else str(raw)


def _pages(keys: Iterable[Any]) -> Iterator[list[Any]]:
    page: list[Any] = []
    for key in keys:
        page.append(key)
        if len(page) == STEP:
            yield page
            page = []
    if page:
        yield page


def _delete(client: Redis, keys: list[Any]) -> int:
    """Delete keys; how many of them there were."""
    return sum(int(client.delete(*keys[at : at + STEP])) for at in range(0, len(keys), STEP))
