"""Workers and callers on hosts with wrong clocks: only Redis' clock counts."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from support.api_process import ApiProcess
from support.caller import address
from support.process import ROOT, eventually, own_environment
from support.redis_server import RedisServer
from support.rig import NewRig
from support.smtp_server import Held

DAY = 86_400

# Python imports this at its start; from then on, every wall clock of the process is off by SHIFT seconds.
SHIFT = """
import datetime, os, time
_by = float(os.environ["SHIFT"])
_time, _real = time.time, datetime.datetime
time.time = lambda: _time() + _by
time.time_ns = lambda: int((_time() + _by) * 1e9)
class _Meta(type):
    def __instancecheck__(cls, one): return isinstance(one, _real)
    def __subclasscheck__(cls, one): return issubclass(one, _real)
class datetime_(_real, metaclass=_Meta):
    @classmethod
    def now(cls, tz=None): return _real.now(tz) + datetime.timedelta(seconds=_by)
    @classmethod
    def utcnow(cls): return _real.utcnow() + datetime.timedelta(seconds=_by)
datetime_.__name__ = datetime_.__qualname__ = "datetime"
datetime.datetime = datetime_
"""


def shifted(folder: Path, seconds: int) -> dict[str, str]:
    """The environment of a process whose wall clock is off by so many seconds."""
    (folder / "sitecustomize.py").write_text(SHIFT)
    return {"PYTHONPATH": f"{folder}:{ROOT}", "SHIFT": str(seconds)}


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [600, -600])
def test_a_caller_with_a_wrong_clock_is_served_as_well_as_any(new_rig: NewRig, tmp_path: Path, seconds: int) -> None:
    rig = new_rig()
    wrong = own_environment({**rig.settings, **shifted(tmp_path, seconds)})
    for _ in range(5):
        send = [sys.executable, "-m", "producer", "send", address()]
        done = subprocess.run(send, env=wrong, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    with ApiProcess({**rig.settings, **shifted(tmp_path, seconds)}) as api:
        for _ in range(5):
            assert api.http.post("/get_varifycode", json={"email": address()}).json()["error"] == 0
    assert len(rig.relay.mails) == 10


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [30, -30, DAY, -DAY])
def test_a_worker_with_a_wrong_clock_serves_as_well_as_any(new_rig: NewRig, tmp_path: Path, seconds: int) -> None:
    rig = new_rig(workers=0)
    wrong = rig.add_worker(environment=shifted(tmp_path, seconds), wait=False)
    right = rig.add_worker()
    wrong.wait_for_log(" ready.")
    held = Held("250 2.0.0 ok")
    slow = [address("slow") for _ in range(4)]
    for email in slow:
        rig.script(email, dot=[held])
    now = time.time()
    ids = rig.caller.request_all(*slow, headers={"enqueued_at": now})
    ids += rig.caller.request_all(*(address() for _ in range(300)), headers={"enqueued_at": now})
    eventually(lambda: len(rig.relay.mails) >= 300)
    time.sleep(3)  # more than the visibility timeout: nothing is taken from a living worker
    assert len(rig.relay.dotted) == 304
    held.release.set()
    assert rig.caller.replies(ids) == [0] * 304
    too_old = rig.caller.request_all(address("old"), headers={"enqueued_at": now - 400})
    assert rig.caller.replies(too_old) == [6]
    again = [address() for _ in range(20)]
    for email in again:
        rig.script(email, rcpt=["451 4.3.0 later"])
    ids = rig.caller.request_all(*again)
    assert rig.caller.replies(ids) == [0] * 20
    # Each also serves alone, and the right one takes over what the wrong one held when it died.
    right.pause()
    assert rig.caller.replies(rig.caller.request_all(address(), headers={"enqueued_at": time.time()})) == [0]
    page = httpx.get(wrong.metrics_url, timeout=60).text
    [count, total] = (
        float(re.findall(rf"^verify_worker_accepted_seconds_{name} (\S+)", page, re.MULTILINE)[0])
        for name in ("count", "sum")
    )
    assert 0 < total < 20 * count  # it measures ages by Redis' clock, too
    email = address("killed")
    stuck = Held("250 2.1.5 ok")
    rig.script(email, rcpt=[stuck])
    request_id = rig.caller.request(email)
    eventually(stuck.reached.is_set)
    wrong.kill()
    right.resume()
    assert rig.caller.reply(request_id)["error"] == 0
    stuck.release.set()
    rig.audit()


# Loaded into a process, it adds to each wall clock the seconds that stand in a file.
SHIFTABLE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static long by(void) {
    static volatile long *shift;
    if (!shift)
        shift = mmap(0, sizeof(long), PROT_READ, MAP_SHARED, open(getenv("SHIFT_FILE"), O_RDONLY), 0);
    return *shift;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int failed = ((int (*)(struct timeval *, void *))dlsym(RTLD_NEXT, "gettimeofday"))(now, zone);
    now->tv_sec += by();
    return failed;
}

int clock_gettime(clockid_t which, struct timespec *now) {
    int failed = ((int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime"))(which, now);
    if (which == CLOCK_REALTIME)
        now->tv_sec += by();
    return failed;
}
"""


@pytest.mark.slow
@pytest.mark.tools
def test_requests_in_hand_are_sent_once_though_redis_clock_is_set_forward(new_rig: NewRig, tmp_path: Path) -> None:
    source, library, shift = (tmp_path / name for name in ("shift.c", "shift.so", "seconds"))
    source.write_text(SHIFTABLE)
    shift.write_bytes(struct.pack("l", 0))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    server = RedisServer()
    server.environment |= {"LD_PRELOAD": str(library), "SHIFT_FILE": str(shift)}
    with server:
        rig = new_rig(server=server, visibility_timeout=15)
        held, ids = rig.hold_at_dot(10)
        rig.add_worker()
        time.sleep(4)  # by now it restores what is abandoned
        rig.worker.pause()  # so that the other one is the first to look
        shift.write_bytes(struct.pack("l", 20))
        time.sleep(1.3)
        rig.worker.resume()
        time.sleep(3)
        held.release.set()
        assert rig.caller.replies(ids) == [0] * 10
        rig.audit()
        rig.close()
