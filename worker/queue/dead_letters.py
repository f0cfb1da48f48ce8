"""Dead letters: what could not be executed, why, and a way back. Addresses are shown masked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from redis import Redis

from producer.contract import DEAD_LETTERS
from producer.errors import VerifyError
from producer.logs import mask_email, mask_text
from producer.redis.scripts import Script
from worker.queue.commands import Reserved
from worker.queue.message import Unfit, parse

_REPLAY = Script(Path(__file__).parent / "replay.lua")


class NoSuchLetter(VerifyError, LookupError):
    """There is no dead letter with that name; `python -m worker dead list` names them."""


class NotReplayable(VerifyError, ValueError):
    """The message is still unfit; replayed, it would only come back."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One message in `verification.dead`."""

    name: str  # the beginning of its digest
    reason: str
    at: datetime
    message: bytes
    raw: bytes

    @classmethod
    def of(cls, raw: bytes) -> DeadLetter:
        """Read one entry of the list; what others pushed there is shown as it can be."""
        name = hashlib.sha256(raw).hexdigest()[:12]
        try:
            entry = json.loads(raw.decode("utf-8", "surrogateescape"))
            at = datetime.fromtimestamp(entry["at"], UTC)
            message = entry["message"].encode("utf-8", "surrogateescape")
            return cls(name, str(entry["reason"]), at, message, raw)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            return cls(name, "not one of our dead letters", datetime.fromtimestamp(0, UTC), raw, raw)

    def summary(self) -> dict[str, Any]:
        """What may be shown of the request in it: its id, and the address masked."""
        try:
            job = parse(Reserved("", self.message)).job
        except Unfit:
            return {"id": None, "email": None}
        return {"id": job.request_id, "email": mask_email(job.request.email), "purpose": str(job.request.purpose)}

    def envelope(self) -> str:
        """The message for the eye: everything but the body, addresses masked."""
        try:
            envelope = json.loads(self.message)
        except (ValueError, RecursionError):
            return f"{len(self.message)} bytes that are not JSON"
        if isinstance(envelope, dict):
            for part in (envelope, envelope.get("headers")):
                if isinstance(part, dict):
                    # Both hold the arguments: base64 is no mask.
                    for name in ("body", "argsrepr", "kwargsrepr"):
                        if name in part:
                            part[name] = "***"
        return mask_text(json.dumps(envelope, indent=2, ensure_ascii=False))


class DeadLetters:
    """The list, newest first. Methods raise `redis.RedisError` if Redis is away."""

    def __init__(self, client: Redis, queue: str) -> None:
        self._client = client
        self._queue = queue

    def list(self, most: int = 100) -> list[DeadLetter]:
        """The newest letters."""
        return [DeadLetter.of(_bytes(raw)) for raw in self._client.lrange(DEAD_LETTERS, 0, most - 1)]

    def count(self) -> int:
        """How many there are."""
        return int(self._client.llen(DEAD_LETTERS))

    def find(self, name: str) -> DeadLetter:
        """The letter with this name. Raises `NoSuchLetter`."""
        for letter in self.list(self.count()):
            if letter.name == name:
                return letter
        raise NoSuchLetter

    def replay(self, letter: DeadLetter) -> None:
        """Put the message back on the queue.

        Its id and its age stay: what was answered is answered the same, what is past its deadline 6, unsent.
        Raises `NotReplayable`, or `NoSuchLetter` if someone was faster.
        """
        try:
            parsed = parse(Reserved("", letter.message))
        except Unfit as exc:
            raise NotReplayable(f"the message is still unfit ({exc}); replayed, it would only come back") from None
        # Without a time of its own, the request is as old as its letter at least.
        parsed.envelope["headers"].setdefault("enqueued_at", letter.at.timestamp())
        message = json.dumps(parsed.envelope)
        if not self._client.register_script(_REPLAY.text)([DEAD_LETTERS, self._queue], [letter.raw, message]):
            raise NoSuchLetter

    def drop(self, letter: DeadLetter) -> None:
        """Forget the message for good. Raises `NoSuchLetter` if someone was faster."""
        if not self._client.lrem(DEAD_LETTERS, 1, letter.raw):  # type: ignore[arg-type]  # bytes are fine
            raise NoSuchLetter


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")
