"""`python -m demo [--once]`, or `make demo [ONCE=1]`."""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # There is nothing to stop yet: Ctrl-C ends it without a traceback out of some import. `main` sees to the rest.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from demo import processes, redis
from demo.api import Doors
from demo.catcher import Catcher
from demo.mailpit_api import LIST, Inbox
from demo.processes import Child, PartMissing
from demo.screen import Screen
from demo.tour import StepFailed, Tour
from producer.api.proto import SERVICE
from producer.errors import VerifyError
from producer.setting_types import mask_url
from producer.settings import PREFIX, Settings, load

COOLDOWN = "2"  # seconds; with the default of 10 everybody would wait
REPLY_TIMEOUT = "30"  # seconds; a very busy machine is no failure
LOOK = 0.25  # seconds between two looks at mailbox, worker and parent
TAKEN = ("REDIS_URL", "LOCALE", "MAIL_FROM")  # what the demo takes from its environment
_INTERRUPTED = 128 + signal.SIGINT


class Stop(BaseException):
    """Someone wants the demo to end."""


def main() -> int:
    """Run the demo; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="One code from request to mailbox, on real parts. Of all settings it takes"
        f" {', '.join(PREFIX + name for name in TAKEN)} from the environment; without the first it starts a Redis.",
    )
    parser.add_argument("--once", action="store_true", help="stop after the steps; exit 0 only if each was true")
    once = parser.parse_args().once
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    screen = Screen()
    with ExitStack() as stack:
        try:
            stage = Stage(stack, screen, once=once)
            if not stage.show():
                return 1
            if not once:
                stage.stay()
        except Stop:
            return _INTERRUPTED
        except VerifyError as exc:
            screen.failed("the demo runs", str(exc))
            return 1
        finally:
            # What follows is bounded; a second Ctrl-C shall not cut it.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
    screen.note("Everything is stopped.")
    return 0


def _stop(*_: object) -> None:
    raise Stop


class Stage:
    """The parts, running: Redis, mail catcher, worker, doors; Flower, if it stays up. They end with `stack`."""

    def __init__(self, stack: ExitStack, screen: Screen, *, once: bool) -> None:
        self._stack = stack
        self._screen = screen
        self._parent = os.getppid()
        env = _environment()
        given = bool(env[f"{PREFIX}REDIS_URL"] or env[f"{PREFIX}REDIS_URL_FILE"])
        self._directory = Path(tempfile.mkdtemp(prefix="verify-demo-"))
        stack.callback(shutil.rmtree, self._directory, ignore_errors=True)
        screen.title("VerifyServer demo")
        self._children: list[Child] = []
        if not given:
            server, env[f"{PREFIX}REDIS_URL"] = redis.start(self._directory)
            stack.callback(server.stop)
            self._children.append(server)
        self.catcher = stack.enter_context(Catcher())
        env[f"{PREFIX}RELAYS"] = self.catcher.url
        env[f"{PREFIX}DEMO"] = "1"
        env[f"{PREFIX}DEMO_INBOX"] = stack.enter_context(Inbox(self.catcher)).url
        self.settings = load(env, dotenv=None)
        server_used = self._redis(given=given)
        self._open(env, once=once)
        screen.fact("Redis", server_used)
        screen.fact("mail catcher", f"{self.catcher.url}   inbox: {env[f'{PREFIX}DEMO_INBOX']}{LIST}")
        screen.note(f"The cooldown between two mails is {COOLDOWN} s here instead of 10, so that nobody waits.")

    def _open(self, env: dict[str, str], *, once: bool) -> None:
        """Worker, Flower, doors. What each needs of the others it waits for by itself, but the page links to Flower."""
        directory, screen = self._directory, self._screen
        self._worker = self._started(processes.worker(directory, env))
        flower = ""
        if not once:
            starting = self._started(processes.flower(directory, env))
            with screen.waiting("starting Flower"):
                [where] = self._places(
                    starting, lambda: processes.flower(directory, env, usual=False), r"Visit me at http://([\d.:]+)"
                )
            flower = f"http://{where}"
        env = {**env, f"{PREFIX}DEMO_FLOWER": flower}
        doors = self._started(processes.doors(directory, env))
        with screen.waiting("starting a worker"):
            self._worker.until(lambda: redis.look(self.settings).workers)
        with screen.waiting("opening the doors"):
            http, rpc = self._places(
                doors,
                lambda: processes.doors(directory, env, usual=False),
                r"HTTP door is open on ([\d.:]+)",
                r"gRPC door is open on ([\d.:]+)",
            )
        self.doors = Doors(f"http://{http}", rpc, reply_timeout=self.settings.reply_timeout)
        page = f"{self.doors.http}/", _instead_of(processes.HTTP_PORT, http)
        if once:
            screen.fact("demo page", "".join(page))
        else:
            screen.highlight("open this", *page)
        screen.fact("worker", f"celery -A worker.app worker   (pid {self._worker.pid})")
        screen.fact("HTTP door", f"{self.doors.http}/docs")
        screen.fact("its metrics", f"{self.doors.http}/metrics")
        screen.fact("gRPC door", f"{rpc}   {SERVICE}{_instead_of(processes.GRPC_PORT, rpc)}")
        if flower:
            screen.fact("Flower", f"{flower}{_instead_of(processes.FLOWER_PORT, flower)}")

    def _places(self, child: Child, again: Callable[[], Child], *patterns: str) -> list[str]:
        """Where it listens, as its log says; started once more if it ended, as a usual port was taken meanwhile."""
        try:
            return [child.says(pattern)[0] for pattern in patterns]
        except PartMissing:
            child.stop()
            self._children.remove(child)
            child = self._started(again())
            return [child.says(pattern)[0] for pattern in patterns]

    def _started(self, child: Child) -> Child:
        self._stack.callback(child.stop)
        self._children.append(child)
        return child

    def _redis(self, *, given: bool) -> str:
        """Which server it is. Raises `PartMissing` if it cannot be used."""
        url = self.settings.redis_url
        try:
            version = redis.version(url)
            if given:
                redis.require_free(self.settings)
        except VerifyError as exc:
            raise PartMissing(
                f"{PREFIX}REDIS_URL, {mask_url(url)}, cannot be used: {exc}.\n"
                f"Name another server, or unset {PREFIX}REDIS_URL: then the demo starts its own."
            ) from exc
        whose = f"yours, from {PREFIX}REDIS_URL" if given else "embedded, nothing on disk"
        return f"{mask_url(url)}   {version}, {whose}"

    def show(self) -> bool:
        """Go through the steps; whether each was true."""
        try:
            Tour(self.settings, self.doors, self.catcher, self._screen).run()
        except StepFailed as exc:
            self._screen.failed(exc.step, exc.why, self._logs())
            return False
        except VerifyError as exc:
            self._screen.failed("the parts stay up", str(exc), self._logs())
            return False
        self._screen.title("Every step was true.")
        return True

    def _logs(self) -> dict[str, str]:
        return {child.name: child.tail() for child in self._children if child.name in {"worker", "doors"}}

    def stay(self) -> None:
        """Print each mail that arrives, until someone wants the demo to end."""
        self._suggest()
        try:
            while True:
                mail = self.catcher.wait(LOOK)
                if mail is not None:
                    self._screen.title(time.strftime("%H:%M:%S  a mail arrived"))
                    self._screen.mail(mail)
                for child in self._children:
                    child.require_running()
                # Whoever started the demo (make, a terminal) was killed: nobody could end it any more.
                if os.getppid() != self._parent:
                    return
        except Stop:
            self._screen.title("Stopping")

    def _suggest(self) -> None:
        url = self.settings.redis_url
        name = f"{PREFIX}REDIS_URL"
        python = os.path.relpath(sys.executable, processes.CHECKOUT)
        screen = self._screen
        screen.title("What to try next, in another terminal")
        # A password does not belong on a screen; who gave it can give it again.
        prefix = f"{name}={url}" if mask_url(url) == url else f"{name}=$YOUR_REDIS_URL"
        body = '"email": "you@example.com"'
        screen.command(f"curl {self.doors.http}/get_varifycode -d '{{{body}}}'")
        screen.command(f'curl {self.doors.http}/check_varifycode -d \'{{{body}, "varifycode": "123456"}}\'')
        for words in (
            "producer send you@example.com",
            "producer check you@example.com 123456",
            "producer settings",
        ):
            screen.command(f"{prefix} {python} -m {words}")
        screen.command(f"tail -f {self._worker.log}")
        pid = self._worker.pid
        screen.command(f"kill -STOP {pid}    # then ask on the page: no worker. kill -CONT {pid} wakes it")
        screen.title("Mails appear here. Ctrl-C ends everything.")


def _environment() -> dict[str, str]:
    """For worker and client alike: the caller's environment, with none of its settings but those in TAKEN.

    An empty setting counts as unset, and keeps `.env` out.
    """
    names = [f"{PREFIX}{name.upper()}" for name in (*Settings.model_fields, "config")]
    blank = {name + suffix: "" for name in names for suffix in ("", "_FILE")}
    taken = {name for setting in TAKEN for name in (PREFIX + setting, f"{PREFIX}{setting}_FILE")}
    env = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX) or name in taken}
    ours = {"RESEND_COOLDOWN": COOLDOWN, "REPLY_TIMEOUT": REPLY_TIMEOUT, "METRICS_BIND": "127.0.0.1:0"}
    return blank | env | {PREFIX + name: value for name, value in ours.items()}


def _instead_of(usual: int, where: str) -> str:
    """Said where a usual port was busy."""
    return "" if where.endswith(f":{usual}") else f"   ({usual} is busy)"


if __name__ == "__main__":
    sys.exit(main())
