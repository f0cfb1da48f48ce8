"""`python -m demo [--once]`, or `make demo [ONCE=1]`."""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Nothing has started yet: end at Ctrl-C without a traceback from some import. `main` sets other handlers.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from demo import embedded_redis, processes
from demo.api_client import ApiClient
from demo.catcher import Catcher
from demo.mailpit_api import LIST, Inbox
from demo.processes import Child, PartMissing
from demo.screen import Screen
from demo.tour import StepFailed, Tour
from producer.api.proto import SERVICE
from producer.errors import VerifyError
from producer.setting_types import mask_url
from producer.settings import PREFIX, Settings, load

COOLDOWN = "2"  # seconds; 10, the default, is long to watch
REPLY_TIMEOUT = "30"  # seconds; long, as the machine may be busy
LOOK = 0.25  # seconds between two looks at the mailbox, the processes and the parent
TAKEN = ("REDIS_URL", "REDIS_PASSWORD", "LOCALE", "MAIL_FROM")  # the settings that the demo takes from its environment
_INTERRUPTED = 128 + signal.SIGINT


class Stop(BaseException):
    """A signal asks the demo to end."""


def main() -> int:
    """Run the demo. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Shows one code from request to mailbox, with a real worker, API and Redis. It takes"
        f" {', '.join(PREFIX + name for name in TAKEN)} from the environment, and no other setting; without the first"
        " it starts a Redis of its own.",
    )
    parser.add_argument("--once", action="store_true", help="stop after the steps; exit 0 only if all succeeded")
    once = parser.parse_args().once
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    screen = Screen()
    with ExitStack() as stack:
        try:
            demo = Demo(stack, screen, once=once)
            if not demo.run_tour():
                return 1
            if not once:
                demo.stay()
        except Stop:
            return _INTERRUPTED
        except VerifyError as exc:
            screen.failed("the demo runs", str(exc))
            return 1
        finally:
            # Stopping takes a bounded time; a second Ctrl-C must not interrupt it.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
    screen.note("Everything is stopped.")
    return 0


def _stop(*_: object) -> None:
    raise Stop


class Demo:
    """The running parts: Redis, mail catcher, worker, API and, if it stays up, Flower. `stack` ends them."""

    def __init__(self, stack: ExitStack, screen: Screen, *, once: bool) -> None:
        self._stack = stack
        self._screen = screen
        self._parent = os.getppid()
        self._env = _environment()
        given = bool(self._env[f"{PREFIX}REDIS_URL"] or self._env[f"{PREFIX}REDIS_URL_FILE"])
        self._directory = Path(tempfile.mkdtemp(prefix="verify-demo-"))
        stack.callback(shutil.rmtree, self._directory, ignore_errors=True)
        screen.title("VerifyServer demo")
        self._children: list[Child] = []
        if not given:
            # Its own Redis has no password.
            self._env |= {f"{PREFIX}REDIS_PASSWORD": "", f"{PREFIX}REDIS_PASSWORD_FILE": ""}
            server, self._env[f"{PREFIX}REDIS_URL"] = embedded_redis.start(self._directory)
            stack.callback(server.stop)
            self._children.append(server)
        self.catcher = stack.enter_context(Catcher())
        inbox = stack.enter_context(Inbox(self.catcher)).url
        self._env |= {f"{PREFIX}RELAYS": self.catcher.url, f"{PREFIX}DEMO": "1", f"{PREFIX}DEMO_INBOX": inbox}
        self.settings = load(self._env, dotenv=None)
        server_used = self._redis(given=given)
        self._open(once=once)
        screen.fact("Redis", server_used)
        screen.fact("mail catcher", f"{self.catcher.url}   inbox: {inbox}{LIST}")
        screen.note(f"The cooldown between two mails is {COOLDOWN} s here instead of 10.")

    def _open(self, *, once: bool) -> None:
        """Start worker, Flower and API. They wait for each other by themselves, but the page links to Flower."""
        directory, screen = self._directory, self._screen
        self._worker = self._started(processes.worker(directory, self._env))
        if not once:
            starting = self._started(processes.flower(directory, self._env))
            with screen.waiting("starting Flower"):
                [where] = self._places(
                    starting,
                    lambda: processes.flower(directory, self._env, usual=False),
                    r"Visit me at http://([\d.:]+)",
                )
            self._env[f"{PREFIX}DEMO_FLOWER"] = f"http://{where}"
        api = self._started(processes.api(directory, self._env))
        with screen.waiting("starting a worker"):
            self._worker.until(lambda: embedded_redis.look(self.settings).workers)
        with screen.waiting("starting the API"):
            http, grpc = self._places(
                api,
                lambda: processes.api(directory, self._env, usual=False),
                r"HTTP API listens on ([\d.:]+)",
                r"gRPC API listens on ([\d.:]+)",
            )
        self._env |= {f"{PREFIX}HTTP_BIND": http, f"{PREFIX}GRPC_BIND": grpc}
        self.api = ApiClient(f"http://{http}", grpc, reply_timeout=self.settings.reply_timeout)
        page = f"{self.api.http}/", _instead_of(processes.HTTP_PORT, http)
        if once:
            screen.fact("demo page", "".join(page))
        else:
            screen.highlight("open this", *page)
        screen.fact("worker", f"celery -A worker.app worker   (pid {self._worker.pid})")
        screen.fact("HTTP API", f"{self.api.http}/docs")
        screen.fact("its metrics", f"{self.api.http}/metrics")
        screen.fact("gRPC API", f"{grpc}   {SERVICE}{_instead_of(processes.GRPC_PORT, grpc)}")
        if flower := self._env[f"{PREFIX}DEMO_FLOWER"]:
            screen.fact("Flower", f"{flower}{_instead_of(processes.FLOWER_PORT, flower)}")

    def _places(self, child: Child, again: Callable[[], Child], *patterns: str) -> list[str]:
        """Where it listens, from its log. Starts it once more if it ended because a usual port was just taken."""
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
        """Describe the server. Raises `PartMissing` if it cannot be used."""
        url = self.settings.redis_url
        try:
            version = embedded_redis.version(url)
            if given:
                embedded_redis.require_free(self.settings)
        except VerifyError as exc:
            raise PartMissing(
                f"{PREFIX}REDIS_URL, {mask_url(url)}, cannot be used: {exc}.\n"
                f"Name another server, or unset {PREFIX}REDIS_URL: then the demo starts its own."
            ) from exc
        whose = f"yours, from {PREFIX}REDIS_URL" if given else "embedded, nothing on disk"
        return f"{mask_url(url)}   {version}, {whose}"

    def run_tour(self) -> bool:
        """Run the steps. Returns whether all succeeded."""
        try:
            Tour(self.settings, self.api, self.catcher, self._screen).run()
        except StepFailed as exc:
            self._screen.failed(exc.step, exc.why, self._logs())
            return False
        except VerifyError as exc:
            self._screen.failed("all parts stay up", str(exc), self._logs())
            return False
        self._screen.title("Every step succeeded.")
        return True

    def _logs(self) -> dict[str, str]:
        return {child.name: child.tail() for child in self._children if child.name in {"worker", "api"}}

    def stay(self) -> None:
        """Print each mail that arrives, until a signal asks the demo to end."""
        self._suggest()
        try:
            while True:
                mail = self.catcher.wait(LOOK)
                if mail is not None:
                    self._screen.title(time.strftime("%H:%M:%S  a mail arrived"))
                    self._screen.mail(mail)
                for child in self._children:
                    child.require_running()
                # The process that started the demo (make, a terminal) was killed: nobody else would end it.
                if os.getppid() != self._parent:
                    return
        except Stop:
            self._screen.title("Stopping")

    def _suggest(self) -> None:
        python = os.path.relpath(sys.executable, processes.CHECKOUT)
        screen = self._screen
        screen.title("What to try next, in another terminal")
        body = '"email": "you@example.com"'
        screen.command(f"curl {self.api.http}/get_varifycode -d '{{{body}}}'")
        screen.command(f'curl {self.api.http}/check_varifycode -d \'{{{body}, "varifycode": "123456"}}\'')
        # In a file, not on the screen: the Redis URL may hold a password.
        settings = self._directory / "settings.env"
        lines = (
            f"export {name}={shlex.quote(value)}\n" for name, value in self._env.items() if name.startswith(PREFIX)
        )
        settings.write_text("".join(lines), encoding="utf-8")
        for words in ("settings", "send you@example.com", "check you@example.com 123456"):
            screen.command(f"(. {settings}; {python} -m producer {words})")
        screen.command(f"tail -f {self._worker.log}")
        pid = self._worker.pid
        screen.command(f"kill -STOP {pid}    # then ask on the page: no worker. kill -CONT {pid} wakes it")
        screen.title("Mails appear here. Ctrl-C ends everything.")


def _environment() -> dict[str, str]:
    """The environment of every part: the caller's, with only those of its settings that are in TAKEN.

    All other settings are empty, which means the default, whatever `.env` says.
    """
    names = [f"{PREFIX}{name.upper()}" for name in (*Settings.model_fields, "config")]
    blank = {name + suffix: "" for name in names for suffix in ("", "_FILE")}
    taken = {name for setting in TAKEN for name in (PREFIX + setting, f"{PREFIX}{setting}_FILE")}
    env = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX) or name in taken}
    # Mails in the language of the terminal, as the page asks for them in the language of the browser.
    locale = "zh-CN" if os.environ.get("LANG", "").startswith("zh") else "en"
    if f"{PREFIX}LOCALE_FILE" not in env:
        env = {f"{PREFIX}LOCALE": locale} | env
    ours = {"RESEND_COOLDOWN": COOLDOWN, "REPLY_TIMEOUT": REPLY_TIMEOUT, "METRICS_BIND": "127.0.0.1:0"}
    return blank | env | {PREFIX + name: value for name, value in ours.items()}


def _instead_of(usual: int, where: str) -> str:
    """A remark where the usual port is busy."""
    return "" if where.endswith(f":{usual}") else f"   ({usual} is busy)"


if __name__ == "__main__":
    sys.exit(main())
