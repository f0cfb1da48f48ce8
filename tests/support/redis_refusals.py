"""Ways to make a Redis server answer and refuse, each for a `with` block. `admin`: a client that may do all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import redis

from support.process import HOST, eventually

NOBODY = 1  # a port where nothing listens


@contextmanager
def full(admin: redis.Redis) -> Iterator[None]:
    """OOM: `maxmemory` is reached."""
    with _configured(admin, "maxmemory", "1", "0"):
        yield


@contextmanager
def too_few_replicas(admin: redis.Redis) -> Iterator[None]:
    """NOREPLICAS."""
    with _configured(admin, "min-replicas-to-write", "9", "0"):
        yield


@contextmanager
def failed_save(admin: redis.Redis) -> Iterator[None]:
    """MISCONF: a directory stands where the file should be, which fails as a full disk does."""
    file = Path(str(admin.config_get("dir")["dir"]), "dump.rdb")
    # Only where saves are configured does a failed one stop writes.
    with _configured(admin, "save", "3600 1000000", ""):
        if file.is_file():  # a server that was ended while saves were configured has written one
            file.unlink()
        (file / "in the way").mkdir(parents=True)
        try:
            _save(admin, "err")
            yield
        finally:
            (file / "in the way").rmdir()
            file.rmdir()
        _save(admin, "ok")
    file.unlink(missing_ok=True)


@contextmanager
def replica(admin: redis.Redis) -> Iterator[None]:
    """READONLY: a replica of nobody, so it keeps its data."""
    admin.replicaof(HOST, NOBODY)
    try:
        yield
    finally:
        admin.replicaof("NO", "ONE")


@contextmanager
def replica_without_primary(admin: redis.Redis) -> Iterator[None]:
    """MASTERDOWN."""
    with _configured(admin, "replica-serve-stale-data", "no", "yes"), replica(admin):
        yield


@contextmanager
def endless_script(admin: redis.Redis) -> Iterator[None]:
    """BUSY."""
    admin.config_set("busy-reply-threshold", 50)

    def run() -> None:
        with suppress(redis.ResponseError):  # it is killed
            admin.eval("while true do end", 0)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        admin.script_kill()
        thread.join()


def cut_connections(admin: redis.Redis) -> None:
    """End the connections of all clients but this one."""
    for kind in ("normal", "pubsub"):
        admin.client_kill_filter(_type=kind, skipme=True)


@contextmanager
def _configured(admin: redis.Redis, name: str, value: str, usual: str) -> Iterator[None]:
    admin.config_set(name, value)
    try:
        yield
    finally:
        admin.config_set(name, usual)


def _save(admin: redis.Redis, status: str) -> None:
    def ended() -> bool:
        with suppress(redis.ResponseError):  # one is under way
            admin.bgsave()
        return bool(admin.info("persistence")["rdb_last_bgsave_status"] == status)

    eventually(ended)
