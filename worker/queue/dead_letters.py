"""Dead letters: messages that could not be executed, why, and a way back to the queue. Addresses are shown masked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from redis import Redis

from producer.contract import DEAD_LETTERS, LARGEST_MESSAGE
from producer.errors import VerifyError
from producer.masking import mask_email, mask_text
from producer.redis.scripts import Script
from worker.queue.message import Reserved, UnfitMessage, parse, read_job

_REPLAY = Script(Path(__file__).parent / "replay.lua")


class NoSuchLetter(VerifyError, LookupError):
    """No dead letter has that name; `python -m worker dead list` shows the names."""


class NotReplayable(VerifyError, ValueError):
    """The message still cannot be executed: replayed, it would only come back."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One message in `verification.dead`."""

    name: str  # the first 12 hexadecimal digits of the entry's SHA-256
    code: str | None  # a `DeadLetterCode`; None: pushed by an older worker, or by hand
    reason: str
    at: datetime
    message: bytes
    raw: bytes  # the entry as it is in the list
    size: int | None = None  # of a message that was too large: its bytes, of which `message` has only the first
    request_id: str | None = None  # of such a message, if it was found

    @classmethod
    def of(cls, raw: bytes) -> DeadLetter:
        """Read an entry of the list, whoever pushed it."""
        name = hashlib.sha256(raw).hexdigest()[:12]
        try:
            entry = json.loads(raw.decode("utf-8", "surrogateescape"))
            code, size, request_id = entry.get("code"), entry.get("size"), entry.get("id")
            return cls(
                name,
                code=code and str(code),
                reason=str(entry["reason"]),
                at=datetime.fromtimestamp(entry["at"], UTC),
                message=entry["message"].encode("utf-8", "surrogateescape"),
                raw=raw,
                size=None if size is None else int(size),
                request_id=None if request_id is None else str(request_id),
            )
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            return cls(name, None, "not written by a worker", datetime.fromtimestamp(0, UTC), raw, raw)

    def fields(self) -> dict[str, object]:
        """What to show of it, addresses masked; the request's id, address and purpose as far as they can be read."""
        at = self.at.isoformat(timespec="seconds")
        code, reason = self.code and mask_text(self.code), mask_text(self.reason)
        found: dict[str, object] = {"name": self.name, "at": at, "code": code, "reason": reason}
        if self.size is not None:
            return found | {"id": self.request_id and mask_text(self.request_id), "email": None, "size": self.size}
        try:
            job = read_job(self.message)
        except UnfitMessage:
            return found | {"id": None, "email": None}
        request = job.request
        request_id, purpose = mask_text(job.request_id), mask_text(str(request.purpose))
        return found | {"id": request_id, "email": mask_email(request.email), "purpose": purpose}

    def envelope(self) -> str:
        """The message's envelope as indented JSON, without the arguments, addresses masked."""
        if self.size is not None:
            return f"the first {len(self.message)} of {self.size} bytes, the rest was not kept"
        try:
            envelope = json.loads(self.message)
            if isinstance(envelope, dict):
                for part in (envelope, envelope.get("headers")):
                    if isinstance(part, dict):
                        with_arguments = part.keys() & {"body", "argsrepr", "kwargsrepr"}
                        part.update(dict.fromkeys(with_arguments, "***"))
            return mask_text(json.dumps(envelope, indent=2, ensure_ascii=False))
        except ValueError:
            return f"{len(self.message)} bytes that are not JSON"
        except RecursionError:
            return f"{len(self.message)} bytes, nested too deeply"


class DeadLetters:
    """The list of dead letters, newest first. Methods raise `redis.RedisError`."""

    def __init__(self, client: Redis, queue: str) -> None:
        self._client = client
        self._queue = queue

    def list(self, most: int = 0) -> list[DeadLetter]:
        """The newest `most` letters; 0: all."""
        return [DeadLetter.of(_bytes(raw)) for raw in self._client.lrange(DEAD_LETTERS, 0, most - 1)]

    def count(self) -> int:
        return int(self._client.llen(DEAD_LETTERS))

    def find(self, name: str) -> DeadLetter:
        """The letter with this name. Raises `NoSuchLetter`."""
        for letter in self.list():
            if letter.name == name:
                return letter
        raise NoSuchLetter

    def replay(self, letter: DeadLetter) -> None:
        """Put the message back on the queue.

        It keeps its id and age: a request that has an answer gets the same one, and one past its deadline is answered
        6, unsent. Raises `NotReplayable`, or `NoSuchLetter` if it has been replayed or dropped meanwhile.
        """
        if letter.size is not None:
            raise NotReplayable(f"only the first {len(letter.message)} of its {letter.size} bytes were kept")
        try:
            parsed = parse(Reserved("", letter.message))
        except UnfitMessage as exc:
            raise NotReplayable(f"it still cannot be executed ({exc}); replayed, it would only come back") from None
        # A request without a time of its own is at least as old as its letter.
        parsed.envelope["headers"].setdefault("enqueued_at", letter.at.timestamp())
        try:
            message = json.dumps(parsed.envelope)
        except RecursionError:
            raise NotReplayable("it is nested too deeply") from None
        if len(message) > LARGEST_MESSAGE:
            raise NotReplayable(f"rewritten, it has {len(message)} bytes; {LARGEST_MESSAGE} are allowed")
        if not self._client.register_script(_REPLAY.text)([DEAD_LETTERS, self._queue], [letter.raw, message]):
            raise NoSuchLetter

    def drop(self, letter: DeadLetter) -> None:
        """Delete the message for good. Raises `NoSuchLetter` if it is gone already."""
        if not self._client.lrem(DEAD_LETTERS, 1, letter.raw):  # type: ignore[arg-type]  # bytes are fine
            raise NoSuchLetter


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")
