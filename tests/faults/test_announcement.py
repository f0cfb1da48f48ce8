"""Before a mail can leave, Redis knows that it may: whoever takes over its request sends it once more at most."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.caller import address
from support.process import eventually
from support.rig import Calling, NewRig, Rig
from support.tcp_proxy import HOLE, PASS, TcpProxy

from producer.store.redis_codes import ANNOUNCE_DATA


def is_announced(rig: Rig) -> bool:
    """Whether Redis knows of the only request that its mail may leave."""
    [record] = rig.codes.keys("request:*")
    return rig.codes.hget(record, "dot") == b"1"


def test_a_mail_is_announced_while_the_relay_answers_and_not_after_it(new_rig: NewRig) -> None:
    rig = new_rig()
    email = address()
    announced: list[bool] = []

    def wait() -> None:
        eventually(lambda: is_announced(rig))
        announced.append(True)

    rig.script(email, data=[Calling("354 go ahead", wait)])
    assert rig.caller.ask(email)["error"] == 0
    assert announced == [True]
    rig.audit()


def test_no_content_leaves_a_worker_whose_announcement_was_not_answered(new_rig: NewRig) -> None:
    rig = new_rig(redis_proxy=True)
    rig.redis_proxy.cut_after(ANNOUNCE_DATA.sha.encode())
    request_id = rig.caller.request(address())
    assert rig.caller.reply(request_id)["error"] == 0
    assert rig.relay.commands.count("DATA") == 2
    assert len(rig.relay.dotted) == 1
    # The first send certainly failed, so it left no doubt and was refunded.
    assert rig.codes.hget(f"request:{request_id}", "doubts") == b"0"
    rig.audit()


@contextmanager
def cut_off(rig: Rig) -> Iterator[Calling]:
    """A reply to DATA before which the first worker loses Redis: as late as it can and still send, and for longer than
    its lease. Afterwards it is reachable again."""

    def cut() -> None:
        deadline = time.monotonic() + 3
        while not is_announced(rig) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        rig.redis_proxy.mode = HOLE

    yield Calling("354 go ahead", cut)
    rig.redis_proxy.mode = PASS
    rig.redis_proxy.reset()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "cut off"])
def test_two_workers_that_cannot_record_what_they_sent_cause_two_mails(new_rig: NewRig, how: str) -> None:
    rig = new_rig(redis_proxy=True, visibility_timeout=4)
    email = address()
    with TcpProxy(rig.server.port) as proxy, cut_off(rig) as cut:

        def fail() -> None:
            if how == "killed":
                rig.workers[1].kill()
            else:
                proxy.mode = HOLE

        rig.script(email, data=[cut], dot=["250 2.0.0 ok", Calling("250 2.0.0 ok", fail)])
        request_id = rig.caller.request(email)
        eventually(lambda: len(rig.mails_to(email)) == 1)
        rig.add_worker(environment={"VERIFY_REDIS_URL": proxy.url()})
        eventually(lambda: len(rig.mails_to(email)) == 2)
        rig.add_worker(environment={"VERIFY_REDIS_URL": rig.server.url()})
        assert rig.caller.reply(request_id)["error"] == 6
        proxy.mode = PASS
        proxy.reset()
    assert len(rig.audit(twice=[request_id]).mails[request_id]) == 2


@pytest.mark.slow
def test_a_consumed_code_is_not_followed_by_another_one(new_rig: NewRig) -> None:
    rig = new_rig(redis_proxy=True, visibility_timeout=4)
    email = address()
    with cut_off(rig) as cut:
        rig.script(email, data=[cut])
        request_id = rig.caller.request(email)
        eventually(lambda: len(rig.mails_to(email)) == 1)
        assert rig.codes.delete(f"code_{email}") == 1
        rig.add_worker(environment={"VERIFY_REDIS_URL": rig.server.url()})
        assert rig.caller.reply(request_id)["error"] == 6
    assert len(rig.audit(twice=[request_id]).mails[request_id]) == 1
