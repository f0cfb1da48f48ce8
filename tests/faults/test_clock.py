"""A worker whose host has the wrong time: all that counts is Redis' clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.harness import BACK, Stage, eventually, new_address
from support.process import ROOT
from support.smtp_server import Held

NewStage = Callable[..., Stage]
DAY = 86_400

# Python imports this at its start: every wall clock of the process is wrong by so many seconds from then on.
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


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [30, -30, DAY, -DAY])
def test_a_worker_with_a_wrong_clock_does_as_well_as_one_with_the_right_one(
    new_stage: NewStage, tmp_path: Path, seconds: int
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SHIFT)
    stage = new_stage(workers=0)
    wrong = stage.add_worker(environment={"PYTHONPATH": f"{tmp_path}:{ROOT}", "SHIFT": str(seconds)}, wait=False)
    right = stage.add_worker()
    wrong.wait_for_log(" ready.", 30)
    held = Held("250 2.0.0 ok")
    slow = [new_address("slow") for _ in range(4)]
    for email in slow:
        stage.script(email, dot=[held])
    now = time.time()
    ids = stage.push(*slow, headers={"enqueued_at": now})
    ids += stage.push(*(new_address() for _ in range(300)), headers={"enqueued_at": now})
    eventually(lambda: len(stage.sink.mails) >= 300)
    time.sleep(3)  # more than the visibility timeout: nobody takes from the living
    assert len(stage.sink.dotted) == 304
    held.release.set()
    assert stage.replies(ids) == [0] * 304
    too_old = stage.push(new_address("old"), headers={"enqueued_at": now - 400})
    assert stage.replies(too_old) == [6]
    again = [new_address() for _ in range(20)]
    for email in again:
        stage.script(email, rcpt=["451 4.3.0 later"])
    ids = stage.push(*again)
    assert stage.replies(ids) == [0] * 20
    # Each serves alone, too; and the right one brings back what the wrong one held.
    right.pause()
    assert stage.ask(new_address()) == 0
    email = new_address("killed")
    stuck = Held("250 2.1.5 ok")
    stage.script(email, rcpt=[stuck])
    [request_id] = stage.push(email)
    eventually(stuck.reached.is_set)
    wrong.kill()
    right.resume()
    assert stage.reply(request_id, BACK) == 0
    stuck.release.set()
    stage.check()
