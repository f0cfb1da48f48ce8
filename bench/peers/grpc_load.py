"""The load on gRPC APIs, ours and the peers': `grpc_load.c` says what it does.

It is in C because it shares its cores with what it measures. A call costs it about 10 µs of CPU (64 callers on four
channels); `grpc.aio` on uvloop took 130 to 155 µs for the same, grpc-js 340 to 360 µs.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, Final

from bench.compiling import compiled
from producer.errors import VerifyError

SOURCE: Final = Path(__file__).parent / "grpc_load.c"
CHANNELS: Final = 4


class LoadFailed(VerifyError):
    """The load on the gRPC API broke off."""


def load(
    port: int, *, callers: int, seconds: float = 0, count: int = 0, prefix: str, channels: int = CHANNELS
) -> dict[str, Any]:
    """Call `GetVarifyCode` on 127.0.0.1 for so many seconds, or so many times; one of the two is given.

    Each of the callers calls again as soon as it is answered, each time for an address of its own, `prefix` and a
    number. Returns `count`: answers of Success that came in time; `seconds`; `answers`: how many by error code, "none"
    for calls that ended without a message; `p50`, `p90`, `p99` of Successes in ms; `cpu`: seconds that it used itself.
    Raises `LoadFailed` if the server goes away, says nothing for 30 s, or answers for another address.
    """
    words = (port, callers, min(channels, callers), seconds, count, prefix)
    done = subprocess.run(  # noqa: S603 - our own program
        [compiled(SOURCE), *map(str, words)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise LoadFailed(done.stderr.strip() or f"grpc_load ended with status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
