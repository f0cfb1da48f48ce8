"""The counting relay of `sink.c`: compiled when it is first needed, one process for each `Sink`."""

from __future__ import annotations

import asyncio
import re
import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple, Self

import trustme

from bench.compiling import compiled
from producer.errors import VerifyError

HOST: Final = "127.0.0.1"
SOURCE: Final = Path(__file__).parent / "sink.c"

_TLS: Final = ("-DTLS", "-lssl", "-lcrypto")  # what it is compiled with; Debian: libssl-dev
_LOGIN: Final = "no-reply%40example.com:password"  # it takes any

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

    Takes every mail that arrives at `url`. Ends with the block, or with this process. With `tls`, `tls_port` speaks
    implicit TLS, with a certificate made for it alone: whoever trusts those in the PEM file `trusted` accepts it.
    """

    def __init__(self, latency: float, *, tls: bool = False) -> None:
        self.latency = latency
        self.port = 0
        self.tls_port = 0
        self._directory = tempfile.TemporaryDirectory(prefix="verify-sink-") if tls else None
        self._asking = asyncio.Lock()
        self._process: asyncio.subprocess.Process
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    @property
    def url(self) -> str:
        """For `VERIFY_RELAYS`."""
        return f"smtp://{HOST}:{self.port}"

    def login_url(self, *, tls: bool) -> str:
        """The same, with a name and a password; over implicit TLS, if it speaks that."""
        scheme, port = ("smtps", self.tls_port) if tls else ("smtp", self.port)
        return f"{scheme}://{_LOGIN}@{HOST}:{port}"

    @property
    def trusted(self) -> Path:
        """A PEM file with the certificate that vouches for it."""
        if self._directory is None:
            raise ValueError("this sink speaks no TLS")
        return Path(self._directory.name) / "ca.pem"

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
        program = await asyncio.to_thread(compiled, SOURCE, *(_TLS if self._directory else ()))
        words = ["0", f"{self.latency * 1000:g}", *([str(self._certificate())] if self._directory else [])]
        self._process = await asyncio.create_subprocess_exec(
            program, *words, stdout=asyncio.subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdout is not None  # noqa: S101 - it was asked for
        said = await self._process.stdout.readline()
        if not said.startswith(b"ports "):
            raise NoSink(f"the sink ended with status {await self._process.wait()} before it listened")
        self.port, self.tls_port = (int(word) for word in said.split()[1:])
        self._reader, self._writer = await asyncio.open_connection(HOST, self.port)
        await self._reader.readline()  # the banner
        return self

    def _certificate(self) -> Path:
        """Key and certificate in one PEM file; P-256, whose handshakes are cheap for both sides."""
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.trusted)
        path = self.trusted.with_name("server.pem")
        authority.issue_cert(HOST).private_key_and_cert_chain_pem.write_to_path(path)
        return path

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        if self._process.returncode is None:
            self._process.terminate()
        await self._process.wait()
        if self._directory is not None:
            self._directory.cleanup()
