"""Steady load on one HTTP and one gRPC port, from a process of its own, and what became of each request.

`python -m bench.restart.load HTTP_PORT GRPC_PORT REQUESTS SECONDS` begins so many requests evenly over so many seconds,
and prints a line with one JSON object: the outcomes of each kind of caller.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import grpc
import httpx
import uvloop
from support.caller import address

from producer.api.proto import METHOD, SERVICE, GetVarifyReq, GetVarifyRsp
from producer.contract import ErrorCode

SLOW: Final = 1.0  # seconds; an answer that takes longer is counted, too
TIMEOUT: Final = 30.0  # seconds for one answer
_THREADS: Final = 48  # for callers that block

Ask = Callable[[str], Awaitable[int]]  # an address; the error code


@dataclass
class Outcomes:
    """Of one kind of caller."""

    sent: int = 0
    slow: int = 0  # of those that were answered Success
    failed: dict[str, int] = field(default_factory=dict)  # by what the caller was told
    longest: float = 0.0  # seconds


async def ask_all(http_port: int, grpc_port: int, requests: int, seconds: float) -> dict[str, Outcomes]:
    """Ask from four kinds of callers at once."""
    outcomes: dict[str, Outcomes] = {}
    bare = httpx.Limits(max_keepalive_connections=0)
    kept: dict[str, Any] = {"base_url": f"http://127.0.0.1:{http_port}", "timeout": TIMEOUT, "trust_env": False}
    blocking = grpc.insecure_channel(f"127.0.0.1:{grpc_port}")
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS))
    with httpx.Client(**kept) as keeping, httpx.Client(**kept, limits=bare) as closing:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}")
        stub, aio_stub = _stub(blocking), _stub(channel)
        callers: dict[str, Ask] = {
            "HTTP, connections kept": lambda email: asyncio.to_thread(_by_http, keeping, email),
            "HTTP, one connection each": lambda email: asyncio.to_thread(_by_http, closing, email),
            "gRPC, grpc.aio": lambda email: _by_aio(aio_stub, email),
            "gRPC, blocking": lambda email: asyncio.to_thread(_blocking, stub, email),
        }
        each, more = divmod(requests, len(callers))
        await asyncio.gather(
            *(
                _steadily(outcomes.setdefault(name, Outcomes()), ask, each + (number < more), seconds)
                for number, (name, ask) in enumerate(callers.items())
            )
        )
        await channel.close(None)
        blocking.close()
    return outcomes


async def _steadily(outcomes: Outcomes, ask: Ask, requests: int, seconds: float) -> None:
    began = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for number in range(requests):
            await asyncio.sleep(began + number * seconds / requests - time.monotonic())
            tasks.create_task(_note(outcomes, ask))


async def _note(outcomes: Outcomes, ask: Ask) -> None:
    began = time.monotonic()
    try:
        error = await ask(address("restart"))
        told = "" if error == ErrorCode.SUCCESS else f"error {error}"
    except httpx.HTTPError as exc:
        told = type(exc).__name__
    except grpc.RpcError as exc:
        told = f"{exc.code().name}: {exc.details()}"
    took = time.monotonic() - began
    outcomes.longest = max(outcomes.longest, took)
    outcomes.sent += 1
    if told:
        outcomes.failed[told] = outcomes.failed.get(told, 0) + 1
    else:
        outcomes.slow += took > SLOW


def _by_http(client: httpx.Client, email: str) -> int:
    answer = client.post("/get_varifycode", json={"email": email})
    return int(answer.raise_for_status().json()["error"])


async def _by_aio(stub: Any, email: str) -> int:
    return int((await stub(GetVarifyReq(email=email), timeout=TIMEOUT)).error)


def _blocking(stub: Any, email: str) -> int:
    return int(stub(GetVarifyReq(email=email), timeout=TIMEOUT).error)


def _stub(channel: Any) -> Any:
    return channel.unary_unary(
        f"/{SERVICE}/{METHOD}",
        request_serializer=GetVarifyReq.SerializeToString,
        response_deserializer=GetVarifyRsp.FromString,
    )


def main() -> None:
    """Ask, and print what became of it."""
    http_port, grpc_port, requests, seconds = sys.argv[1:]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcomes = runner.run(ask_all(int(http_port), int(grpc_port), int(requests), float(seconds)))
    sys.stdout.write(f"\n{json.dumps({name: asdict(each) for name, each in outcomes.items()})}\n")


if __name__ == "__main__":
    main()
