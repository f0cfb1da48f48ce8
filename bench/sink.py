"""The counting relay of `sink.c`: compiled when it is first needed, one process for each `Sink`."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Final, NamedTuple, Self

from bench.compiling import compiled
from producer.errors import VerifyError

HOST: Final = "127.0.0.1"
SOURCE: Final = Path(__file__).parent / "sink.c"

_SHORTEST, _LONGEST = 0.002, 0.1  # seconds from one look at the count to the next
_COUNT: Final = re.compile(rb"250 mails=(\d+) connections=(\d+) most=(\d+)\r\n")


class NoSink(VerifyError):
    """The sink did not start, or is gone."""


class Count(NamedTuple):
    """What the sink has seen. Whoever never said EHLO or HELO is no connection."""

    mails: int
    connections: int  # open now
    most: int  # open at one time


class Sink:
    """`async with Sink(latency) as sink:`; latency is the seconds from a mail's final dot to its 250.

    Takes every mail that arrives at `url`. Ends with the block, or with this process.
    """

    def __init__(self, latency: float) -> None:
        self.latency = latency
        self.port = 0
        self._asking = asyncio.Lock()
        self._process: asyncio.subprocess.Process
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    @property
    def url(self) -> str:
        """For `VERIFY_RELAYS`."""
        return f"smtp://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    async def count(self) -> Count:
        """What it has seen so far."""
        async with self._asking:
            self._writer.write(b"XCOUNT\r\n")
            line = await self._reader.readline()
        found = _COUNT.fullmatch(line)
        if found is None:
            raise NoSink(f"the sink is gone, or answers {line!r}")
        return Count(*map(int, found.groups()))

    async def until(self, mails: int) -> float:
        """Wait until it has taken so many mails; `time.monotonic()` then, at most a few ms late.

        It is asked more often the closer the count is, by the rate so far: asking takes CPU from what is measured.
        """
        began, first = time.monotonic(), (await self.count()).mails
        taken = first
        while taken < mails:
            rate = (taken - first) / (time.monotonic() - began)
            left = (mails - taken) / rate if rate else _LONGEST
            await asyncio.sleep(min(max(left / 2, _SHORTEST), _LONGEST))
            taken = (await self.count()).mails
        return time.monotonic()

    async def __aenter__(self) -> Self:
        program = await asyncio.to_thread(compiled, SOURCE)
        self._process = await asyncio.create_subprocess_exec(
            program, "0", f"{self.latency * 1000:g}", stdout=asyncio.subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdout is not None  # noqa: S101 - it was asked for
        said = await self._process.stdout.readline()
        if not said.startswith(b"port "):
            raise NoSink(f"the sink ended with status {await self._process.wait()} before it listened")
        self.port = int(said.split()[1])
        self._reader, self._writer = await asyncio.open_connection(HOST, self.port)
        await self._reader.readline()  # the banner
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        if self._process.returncode is None:
            self._process.terminate()
        await self._process.wait()
