"""What every test may ask for. Each xdist worker is a process of its own, so each has its own servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import redis as redis_py
from redis_server import RedisServer


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """The server that all tests of this process share: never kill, pause or reconfigure it."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis(redis_server: RedisServer) -> Iterator[redis_py.Redis]:
    """A client of the shared server's database 0; all databases are empty."""
    with redis_server.client() as client:
        client.flushall()
        yield client


@pytest.fixture
def new_redis_server() -> Iterator[Callable[..., RedisServer]]:
    """Starts a server of the test's own, which it may kill, pause and restart; takes what `RedisServer` takes."""
    with ExitStack() as stack:

        def start(**options: object) -> RedisServer:
            return stack.enter_context(RedisServer(**options))  # type: ignore[arg-type]  # passed on as given

        yield start
