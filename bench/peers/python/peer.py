"""What the peers on Python have in common: their settings, the job, and that they end with their parent."""

from __future__ import annotations

import ctypes
import json
import os
import re
import secrets
import signal
import smtplib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import redis

REDIS_URL: Final = os.environ["PEER_REDIS_URL"]
SMTP_PORT: Final = int(os.environ.get("PEER_SMTP_PORT", "0"))
CONNECTIONS: Final = int(os.environ.get("PEER_CONNECTIONS", "1"))  # of each process to the relay
PROCESSES: Final = int(os.environ.get("PEER_PROCESSES", "1"))

_CODE_TTL: Final = 600  # seconds
_MARK_TTL: Final = 3600
_SENDER: Final = "no-reply@example.com"
_SLOTS: Final = re.compile("(RECIPIENT@peer.example|CODE|REFERENCE)")
_PIECES: Final = _SLOTS.split(Path(os.environ["PEER_MAIL"]).read_bytes().decode("ascii"))
_PR_SET_PDEATHSIG: Final = 1

_here = threading.local()


def end_with_parent() -> None:
    """This process is killed when its parent has ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def addresses(first: int, count: int) -> Iterator[str]:
    """Different ones."""
    return (f"user{number:07}@example.com" for number in range(first, first + count))


def codes() -> redis.Redis:
    """A client of the codes' database, one for each thread, so that none waits for another's lock."""
    if not hasattr(_here, "redis"):
        _here.redis = redis.Redis.from_url(REDIS_URL, single_connection_client=True)
    client: redis.Redis = _here.redis
    return client


def send_code(email: str, request_id: str) -> None:
    """Get or create the code, in one step, and mail it on this thread's kept connection."""
    fresh = f"{secrets.randbelow(10**6):06}"
    found = codes().set(f"code_{email}", fresh, ex=_CODE_TTL, nx=True, get=True)
    code = found.decode() if isinstance(found, bytes) else fresh
    filled = {"RECIPIENT@peer.example": email, "CODE": code, "REFERENCE": request_id}
    mail = "".join([filled.get(piece, piece) for piece in _PIECES]).encode("ascii")
    if not hasattr(_here, "relay"):
        _here.relay = smtplib.SMTP("127.0.0.1", SMTP_PORT)
    _here.relay.sendmail(_SENDER, [email], mail)


def mark_and_reply(email: str, request_id: str, *, reply: bool) -> None:
    """The sent mark, and with `reply` the reply, stored and published: all in one round trip."""
    with codes().pipeline(transaction=False) as pipeline:
        pipeline.set(f"sent:{request_id}", 1, ex=_MARK_TTL)
        if reply:
            text = json.dumps({"email": email, "error": 0})
            pipeline.set(f"reply:{request_id}", text, ex=_MARK_TTL)
            pipeline.publish(f"reply:{request_id}", text)
        pipeline.execute()
