"""Limits for one end user of a caller and for everything, on a real worker; and what is shown of that end user."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
from support.caller import address, message
from support.rig import Rig
from typer.testing import CliRunner

from worker.cli import app


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig(resend_cooldown=0, max_sends_per_client=10, fold_aliases=1) as rig:
        rig.add_worker()
        yield rig


def word() -> str:
    """A word for an end user that no other test uses."""
    return f"user-{uuid.uuid4()}"


def asked(rig: Rig, emails: list[str], client: str | None = None) -> Counter[int]:
    """How the requests for these addresses were answered; the caller names one end user, or none."""
    more = {} if client is None else {"client": client}
    return Counter(rig.caller.replies(rig.caller.push(*(message({"email": email, **more}) for email in emails))))


def test_a_stranger_cannot_use_up_the_mails_of_an_address(rig: Rig) -> None:
    email = address("somebodys.address")
    spellings = [email[:i].upper() + email[i:] for i in range(1, 21) if email[i - 1].isalpha()]
    spellings = [*spellings, *(f"{spelling} " for spelling in spellings)][:20]
    assert len(set(spellings)) == 20
    assert asked(rig, spellings, client=word()) == {0: 5, 4: 15}
    assert asked(rig, [email], client=word()) == {0: 1}
    assert len(rig.mails_to(email)) == 1


def test_plus_tags_and_dots_of_one_mailbox_share_its_mails(rig: Rig) -> None:
    name = uuid.uuid4().hex
    tags = [f"{name}+{i}@gmail.com" for i in range(20)]
    dots = [f"{name[:i]}.{name[i:]}@googlemail.com" for i in range(1, 20)]
    assert asked(rig, tags + dots) == {0: 20, 4: 19}


def test_one_end_user_gets_so_many_mails_over_all_addresses(rig: Rig) -> None:
    strangers = [address() for _ in range(50)]
    assert asked(rig, strangers, client=word()) == {0: 10, 4: 40}
    assert asked(rig, [address()], client=word()) == {0: 1}
    assert asked(rig, [address()]) == {0: 1}


def test_all_mails_together_have_a_limit(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(max_sends_total=10)
    rig.add_worker()
    assert asked(rig, [address() for _ in range(30)]) == {0: 10, 4: 20}
    assert asked(rig, [address()], client=word()) == {4: 1}


def test_the_word_for_an_end_user_is_shown_nowhere(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rig looks for it in the log, at DEBUG, and in the events."""
    client, email = word(), address()
    soon = (datetime.now(UTC) + timedelta(seconds=0.2)).isoformat()
    request = {"email": email, "client": client}
    [fast] = rig.caller.push(message(request))
    [through_celery] = rig.caller.push(message({**request, "purpose": "login"}, headers={"eta": soon}))
    assert rig.caller.replies([fast, through_celery]) == [0, 0]
    assert rig.caller.ask(address(), client=client + "x" * 64)["error"] == 2

    conflict = message({**request, "email": address()}, request_id=fast, headers={"kwargsrepr": repr(request)})
    rig.caller.push(conflict)
    rig.settled()
    for name, value in rig.settings.items():
        monkeypatch.setenv(name, value)
    listed = CliRunner().invoke(app, ["dead", "list"])
    shown = CliRunner().invoke(app, ["dead", "show", listed.output.split()[0]])
    assert fast in listed.output
    assert fast in shown.output
    assert client not in listed.output + shown.output
    assert not [key for key in (*rig.codes.scan_iter(), *rig.results.scan_iter()) if client.encode() in key]
