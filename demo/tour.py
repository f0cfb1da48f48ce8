"""The steps that are shown, each of which must be true."""

from __future__ import annotations

import time
import uuid

from demo import redis
from demo.catcher import Catcher, Mail
from demo.screen import Screen
from producer.client import VerificationClient
from producer.contract import ErrorCode, code_key
from producer.settings import Settings

MAIL_PATIENCE = 10.0  # seconds between the reply and the mail in the mailbox; the reply already says that it is there


class StepFailed(Exception):
    """A step was not true."""

    def __init__(self, step: str, why: str) -> None:
        super().__init__(f"{step}: {why}")
        self.step = step
        self.why = why


class Tour:
    """Asks for a code twice, and checks it twice."""

    def __init__(self, settings: Settings, catcher: Catcher, screen: Screen) -> None:
        self._settings = settings
        self._catcher = catcher
        self._screen = screen
        # New in each run: what an earlier one left in Redis has no say.
        self._email = f"demo-{uuid.uuid4().hex[:8]}@example.com"
        self._key = code_key(self._email)

    def run(self) -> None:
        """All steps. Raises `StepFailed` at the first that is not true."""
        with VerificationClient(self._settings) as client:
            self._screen.title("1  Ask for a code")
            code, life = self._first(client)
            self._screen.title("2  Ask again after the cooldown")
            self._second(client, code, life)
            self._screen.title("3  Check")
            self._check(client, _other(code), ErrorCode.VARIFY_CODE_ERR, "a wrong code is refused")
            self._check(client, code, ErrorCode.SUCCESS, "the right code is accepted")
        gone, _ = self._stored()
        _require(gone is None, "the code is consumed", f"{self._key} still holds {gone}")
        self._screen.done(f"{self._key} is gone: a code works once")

    def _first(self, client: VerificationClient) -> tuple[str, float]:
        mail = self._request(client)
        self._screen.mail(mail)
        code, life = self._stored()
        if code is None:
            raise StepFailed("the code is in Redis", f"there is no key {self._key}")
        self._screen.fact("in Redis", f"{self._key} = {code}")
        self._screen.fact("time to live", f"{life:.0f} s")
        _require(life > 0, "the code in Redis has a time to live", f"PTTL {self._key} answered {life * 1000:.0f}")
        self._require_code(mail, code)
        return code, life

    def _second(self, client: VerificationClient, code: str, life: float) -> None:
        cooldown = self._settings.resend_cooldown
        with self._screen.waiting(f"waiting {cooldown:g} s"):
            time.sleep(cooldown + 0.2)
        mail = self._request(client)
        stored, left = self._stored()
        step = "the same code came again"
        _require(stored == code, step, f"{self._key} held {code} and now holds {stored}")
        _require(left < life, "a resend does not move the expiry", f"{life:.1f} s were left, and now {left:.1f} s are")
        self._require_code(mail, code)
        self._screen.fact("in Redis", f"{self._key} = {code}, {left:.0f} s left")
        self._screen.done(f"{step}, and its expiry did not move")

    def _request(self, client: VerificationClient) -> Mail:
        step = "a request is answered with Success"
        self._screen.note(f'client.request("{self._email}")')
        began = time.monotonic()
        reply = client.request(self._email)
        took = (time.monotonic() - began) * 1000
        self._screen.fact("reply", f'{{"email": "{reply.email}", "error": {int(reply.error)}}}   {took:.0f} ms')
        _require(
            reply.error is ErrorCode.SUCCESS and reply.email == self._email, step, f"the error is {_named(reply.error)}"
        )
        mail = self._catcher.wait(MAIL_PATIENCE)
        while mail is not None and mail.recipient != self._email:
            mail = self._catcher.wait(MAIL_PATIENCE)
        if mail is None:
            raise StepFailed("the mail arrives", f"none came within {MAIL_PATIENCE:.0f} s")
        return mail

    def _require_code(self, mail: Mail, code: str) -> None:
        found = mail.codes(len(code))
        step = f"the code in the mail is the one in {self._key}"
        _require(found == [code], step, f"the mail says {', '.join(found) or 'none'}, and Redis {code}")
        self._screen.done(step)

    def _check(self, client: VerificationClient, code: str, expected: ErrorCode, step: str) -> None:
        result = client.check(self._email, code)
        self._screen.fact(f"check {code}", f"error {_named(result.error)}")
        _require(result.error is expected, step, f"expected was {_named(expected)}")
        self._screen.done(step)

    def _stored(self) -> tuple[str | None, float]:
        """The code as GateServer reads it, and the seconds that it lives."""
        code, life = redis.ask(self._settings.codes_url, ("GET", self._key), ("PTTL", self._key))
        return None if code is None else code.decode(), life / 1000


def _require(true: bool, step: str, why: str) -> None:
    if not true:
        raise StepFailed(step, why)


def _named(error: ErrorCode) -> str:
    return f"{int(error)} ({error.title})"


def _other(code: str) -> str:
    """A code that it is not."""
    return ("1" if code[0] == "0" else "0") + code[1:]
