"""An SMTP server that accepts mail for every address and keeps it to be looked at."""

from __future__ import annotations

import asyncio
import queue
import re
import secrets
import threading
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from typing import Any, Literal, Self

from aiosmtpd.smtp import SMTP

HOST = "127.0.0.1"
KEPT = 200  # the newest mails


@dataclass(frozen=True, slots=True)
class Mail:
    """One mail for one recipient."""

    recipient: str
    message: EmailMessage
    arrived: datetime = field(default_factory=lambda: datetime.now(UTC))
    id: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def text(self) -> str:
        return self._part("plain")

    @property
    def html(self) -> str:
        return self._part("html")

    def _part(self, kind: Literal["plain", "html"]) -> str:
        part = self.message.get_body((kind,))
        return part.get_content() if part is not None else ""

    def codes(self, length: int) -> list[str]:
        """Every run of exactly `length` digits in the text part: what a reader, or a phone, takes for the code."""
        return re.findall(rf"(?<![0-9])[0-9]{{{length}}}(?![0-9])", self.text)


class Catcher:
    """Listens on a free port. `with Catcher() as catcher:`, then `catcher.url` and `catcher.wait()`."""

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[Mail] = queue.SimpleQueue()
        self.kept: deque[Mail] = deque(maxlen=KEPT)  # the newest first
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="catcher", daemon=True)
        self.url = ""

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802 - aiosmtpd's name
        message = message_from_bytes(envelope.original_content, policy=default)
        for recipient in envelope.rcpt_tos:
            mail = Mail(recipient, message)
            self.kept.appendleft(mail)
            self._arrived.put(mail)
        return "250 OK"

    def wait(self, seconds: float) -> Mail | None:
        """The next mail; None if none comes in time."""
        try:
            return self._arrived.get(timeout=seconds)
        except queue.Empty:
            return None

    async def _listen(self) -> int:
        server = await self._loop.create_server(
            lambda: SMTP(self, hostname="catcher.localhost", enable_SMTPUTF8=True, loop=self._loop), HOST, 0
        )
        port: int = server.sockets[0].getsockname()[1]
        return port

    def __enter__(self) -> Self:
        self._thread.start()
        port = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        self.url = f"smtp://{HOST}:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=2)
