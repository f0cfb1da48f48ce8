"""Strangers with many connections, in a process of their own: each sends an opening, then one filler for ever.

`Attacker` starts it; `python -m support.attacks` is what it starts.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from support.process import HOST, ROOT, Process, own_environment

MB: Final = 1024 * 1024
_BLOCK: Final = 32 * 1024  # bytes in one send
_AGAIN: Final = 1.0  # seconds before a connection that was closed is opened again


@dataclass(frozen=True)
class Attack:
    """What one connection of a stranger sends. It opens another when it is hung up on."""

    opening: bytes
    filler: bytes = b""  # without one, the connection is held open after the opening
    reads: bool = True  # whether it reads what it is answered

    def to_json(self) -> dict[str, Any]:
        """As it travels to the attacking process."""
        return {
            name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Attack:
        """The other way round."""
        decoded: dict[str, Any] = {
            name: base64.b64decode(value) if isinstance(value, str) else value for name, value in fields.items()
        }
        return cls(**decoded)


class Attacker(Process):
    """`with Attacker(port, attack, connections=60, megabytes=8) as attacker:` attacks until the end of the block."""

    def __init__(
        self,
        port: int,
        attack: Attack,
        *,
        connections: int,
        megabytes: float,
        seconds: float = 120,
        tls: bool = False,
    ) -> None:
        """`megabytes` are sent in all; then, and for at most `seconds`, the connections are only held open.

        `tls`: it believes any certificate.
        """
        words = [str(port), str(connections), str(int(megabytes * MB)), str(seconds), json.dumps(attack.to_json())]
        words.append("tls" if tls else "")
        environment = own_environment({"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
        super().__init__("attacker", [sys.executable, "-m", "support.attacks", *words], environment)
        self._connections = connections

    def wait_until_ready(self) -> None:
        self.wait_for_log("opened")

    def wait_until_spent(self, within: float = 60.0) -> None:
        """Return when all is sent, each connection was refused at least once, or the time has passed."""
        deadline = time.monotonic() + within
        while time.monotonic() < deadline and "spent" not in self.log and self.alive:
            time.sleep(0.02)

    @property
    def sent(self) -> int:
        """Bytes sent so far."""
        return int(self.log.split()[-2]) if "sent" in self.log else 0


class _Strangers:
    def __init__(self, port: int, attack: Attack, connections: int, budget: int, seconds: float, *, tls: bool) -> None:
        self._port = port
        self._attack = attack
        self._connections = connections
        self._budget = budget
        self._deadline = time.monotonic() + seconds
        self._block = attack.filler * max(1, _BLOCK // max(1, len(attack.filler)))
        self._opened = self._sent = self._refused = 0
        self._tls = ssl.create_default_context() if tls else None
        if self._tls is not None:
            self._tls.check_hostname, self._tls.verify_mode = False, ssl.CERT_NONE

    async def run(self) -> None:
        each = [asyncio.create_task(self._one()) for _ in range(self._connections)]
        said = False
        while time.monotonic() < self._deadline:
            await asyncio.sleep(0.02)
            if self._opened >= self._connections and not said:
                said = True
                _say("opened")
            done = self._sent >= self._budget or (not self._attack.filler and self._opened >= self._connections)
            if (done and said) or self._refused >= self._connections:
                _say(f"spent: sent {self._sent} bytes, refused {self._refused}")
                break
        await asyncio.sleep(max(0.0, self._deadline - time.monotonic()))
        for task in each:
            task.cancel()
        await asyncio.gather(*each, return_exceptions=True)

    async def _one(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                # So little is taken in before somebody reads it.
                reader, writer = await asyncio.open_connection(HOST, self._port, ssl=self._tls, limit=1)
                try:
                    await self._send(writer, self._attack.opening)
                    self._opened += 1
                    await self._both(reader, writer)
                finally:
                    writer.transport.abort()
            self._refused += 1
            await asyncio.sleep(_AGAIN)

    async def _both(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send and read until the server hangs up."""
        tasks = [asyncio.ensure_future(self._flood(writer))]
        if self._attack.reads:
            tasks.append(asyncio.ensure_future(self._read(reader)))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(OSError):
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _flood(self, writer: asyncio.StreamWriter) -> None:
        while self._block and self._sent < self._budget:
            await self._send(writer, self._block)
        if not self._attack.reads:
            await asyncio.Event().wait()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while await reader.read(65536):
            pass
        raise ConnectionResetError

    async def _send(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(data)
        await writer.drain()
        self._sent += len(data)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def memory(pid: int) -> float:
    """MB that the process has resident."""
    return _status(pid, "VmRSS")


def peak_memory(pid: int) -> float:
    """The most MB that the process had resident, since `forget_peak`."""
    return _status(pid, "VmHWM")


def forget_peak(pid: int) -> None:
    """Let `peak_memory` begin anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _status(pid: int, name: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise LookupError(name)


if __name__ == "__main__":
    _port, _many, _bytes, _seconds, _attack, _tls = sys.argv[1:]
    strangers = _Strangers(
        *(int(_port), Attack.from_json(json.loads(_attack)), int(_many), int(_bytes), float(_seconds)), tls=bool(_tls)
    )
    asyncio.run(strangers.run())
