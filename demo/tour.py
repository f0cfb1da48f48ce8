"""The steps that the demo shows and verifies."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from demo import embedded_redis
from demo.api_client import ApiClient, NoAnswer
from demo.catcher import Catcher, Mail
from demo.screen import Screen
from producer.api.proto import METHOD, SERVICE
from producer.contract import ErrorCode, code_key
from producer.settings import Settings

MAIL_TIMEOUT = 10.0  # seconds from the reply, which says that the mail was accepted, to the mail in the mailbox


class StepFailed(Exception):
    def __init__(self, step: str, why: str) -> None:
        super().__init__(f"{step}: {why}")
        self.step = step
        self.why = why


class Tour:
    """Asks for a code twice and checks it twice over HTTP; then asks once over gRPC."""

    def __init__(self, settings: Settings, api: ApiClient, catcher: Catcher, screen: Screen) -> None:
        self._settings = settings
        self._api = api
        self._catcher = catcher
        self._screen = screen

    def run(self) -> None:
        """Run all steps. Raises `StepFailed` at the first that fails."""
        # New in each run: an earlier run may have left codes and cooldowns in Redis.
        name = f"demo-{uuid.uuid4().hex[:8]}"
        email = f"{name}@example.com"
        self._screen.title("1  Ask for a code")
        code, life = self._first(email)
        self._screen.title("2  Ask again after the cooldown")
        self._second(email, code, life)
        self._screen.title("3  Check")
        self._check(email, _other(code), ErrorCode.VARIFY_CODE_ERR, "a wrong code is refused")
        self._check(email, code, ErrorCode.SUCCESS, "the right code is accepted")
        gone, _ = self._stored(email)
        key = code_key(email)
        _require(gone is None, "the code is consumed", f"{key} still holds {gone}")
        self._screen.done(f"{key} is gone: a code works once")
        self._screen.title("4  Ask over gRPC, as GateServer does")
        self._over_grpc(f"{name}-grpc@example.com")

    def _first(self, email: str) -> tuple[str, float]:
        mail = self._request(email)
        self._screen.mail(mail)
        code, life = self._stored(email)
        key = code_key(email)
        if code is None:
            raise StepFailed("the code is in Redis", f"there is no key {key}")
        self._screen.fact("in Redis", f"{key} = {code}")
        self._screen.fact("time to live", f"{life:.0f} s")
        _require(life > 0, "the code in Redis has a time to live", f"PTTL {key} answered {life * 1000:.0f}")
        self._require_code(mail, code, email)
        return code, life

    def _second(self, email: str, code: str, life: float) -> None:
        cooldown = self._settings.resend_cooldown
        with self._screen.waiting(f"waiting {cooldown:g} s"):
            time.sleep(cooldown + 0.2)
        mail = self._request(email)
        stored, left = self._stored(email)
        key = code_key(email)
        step = "the same code came again"
        _require(stored == code, step, f"{key} held {code} and now holds {stored}")
        _require(left < life, "a resend does not move the expiry", f"{life:.1f} s were left, and now {left:.1f} s are")
        self._require_code(mail, code, email)
        self._screen.fact("in Redis", f"{key} = {code}, {left:.0f} s left")
        self._screen.done(f"{step}, and its expiry did not move")

    def _over_grpc(self, email: str) -> None:
        step = "a call is answered with Success, and without the code"
        self._screen.note(f'{SERVICE}/{METHOD}(email="{email}")')
        began = time.monotonic()
        try:
            reply = self._api.get_varify_code(email)
        except NoAnswer as exc:
            raise StepFailed(step, str(exc)) from exc
        took = (time.monotonic() - began) * 1000
        said = f'error: {reply.error}  email: "{reply.email}"  code: "{reply.code}"'
        self._screen.fact("reply", f"{said}   {took:.0f} ms")
        _require((reply.error, reply.email, reply.code) == (ErrorCode.SUCCESS, email, ""), step, f"it is {said}")
        mail = self._arrived(email)
        code, _ = self._stored(email)
        self._screen.fact("mail", f"{mail.message['Subject']}, to {mail.message['To']}")
        self._screen.fact("in Redis", f"{code_key(email)} = {code}")
        self._require_code(mail, code or "", email)

    def _request(self, email: str) -> Mail:
        step = "a request is answered with Success"
        answer, took = self._post(step, "/get_varifycode", email=email)
        self._screen.fact("reply", f"{json.dumps(answer)}   {took:.0f} ms")
        _require(answer == {"error": int(ErrorCode.SUCCESS), "email": email}, step, f"it is {answer}")
        return self._arrived(email)

    def _arrived(self, email: str) -> Mail:
        mail = self._catcher.wait(MAIL_TIMEOUT)
        while mail is not None and mail.recipient != email:
            mail = self._catcher.wait(MAIL_TIMEOUT)
        if mail is None:
            raise StepFailed("the mail arrives", f"none came within {MAIL_TIMEOUT:.0f} s")
        return mail

    def _require_code(self, mail: Mail, code: str, email: str) -> None:
        found = mail.codes(self._settings.code_length)
        step = f"the code in the mail is the one in {code_key(email)}"
        _require(found == [code], step, f"the mail says {', '.join(found) or 'none'}, and Redis {code or 'none'}")
        self._screen.done(step)

    def _check(self, email: str, code: str, expected: ErrorCode, step: str) -> None:
        answer, _ = self._post(step, "/check_varifycode", email=email, varifycode=code)
        self._screen.fact("reply", json.dumps(answer))
        _require(answer == {"error": int(expected), "email": email}, step, f"expected {_named(expected)}")
        self._screen.done(f"{step}: {_named(expected)}")

    def _post(self, step: str, path: str, **content: str) -> tuple[dict[str, Any], float]:
        """The answer, and how many milliseconds it took."""
        self._screen.note(f"POST {self._api.http}{path}  {json.dumps(content)}")
        began = time.monotonic()
        try:
            answer = self._api.post(path, **content)
        except NoAnswer as exc:
            raise StepFailed(step, str(exc)) from exc
        return answer, (time.monotonic() - began) * 1000

    def _stored(self, email: str) -> tuple[str | None, float]:
        """The code as GateServer reads it, and the seconds it has left."""
        key = code_key(email)
        code, life = embedded_redis.ask(self._settings.codes_url, ("GET", key), ("PTTL", key))
        return None if code is None else code.decode(), life / 1000


def _require(true: bool, step: str, why: str) -> None:
    if not true:
        raise StepFailed(step, why)


def _named(error: ErrorCode) -> str:
    return f"{int(error)} ({error.title})"


def _other(code: str) -> str:
    return ("1" if code[0] == "0" else "0") + code[1:]
