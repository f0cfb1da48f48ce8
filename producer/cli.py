"""`send`, `check`, `settings` and `serve` at a terminal."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.text import Text

from producer import logs
from producer.client import VerificationClient
from producer.contract import DEFAULT_PURPOSE, PURPOSE_PATTERN, ErrorCode, is_purpose
from producer.errors import VerifyError
from producer.setting_types import mask_url
from producer.settings import Settings, load_or_exit

INTERRUPTED: Final = 130  # exit status of a program that Ctrl-C ended

EPILOG: Final = (
    "Exit status: 0 only on Success; 1 any other answer; 2 wrong usage or a bad setting; 130 Ctrl-C.\n\n"
    "Answers: 0 Success, 1 RedisErr, 2 Exception, 3 InvalidAddress, 4 TooManyRequests, 5 MailRejected, 6 Timeout"
    " (unknown, ask again), 1003 VarifyExpired (no live code), 1004 VarifyCodeErr (wrong code).\n\n"
    "Environment, or .env: VERIFY_REDIS_URL (default redis://127.0.0.1:6379), VERIFY_CODES_URL, VERIFY_BROKER_URL,"
    " VERIFY_RESULTS_URL, VERIFY_QUEUE, VERIFY_REPLY_TIMEOUT (seconds), VERIFY_CONFIG (an old config.json); any of"
    " them as NAME_FILE for a secret file. `python -m producer settings` shows all that are in force."
)

SERVE_EPILOG: Final = (
    "Stops at SIGTERM or Ctrl-C: what was accepted is answered, within 10 s; a second one stops at once. Exit status: 0"
    " stopped so; 2 a bad setting, a place where it may not listen, or a busy port.\n\n"
    "HTTP: POST /get_varifycode, POST /check_varifycode, GET /healthz, /readyz, /metrics, /docs. gRPC:"
    " message.VarifyService/GetVarifyCode, health, reflection.\n\n"
    "Environment, or .env: VERIFY_HTTP_BIND (default 127.0.0.1:8081), VERIFY_GRPC_BIND (127.0.0.1:50051),"
    " VERIFY_API_KEYS (comma-separated; the HTTP door then asks for one), VERIFY_ALLOW_PLAINTEXT (1: listen beyond"
    " loopback without TLS or keys), VERIFY_MAX_QUEUE (100000; with more requests waiting the answer is"
    " TooManyRequests), VERIFY_REPLY_TIMEOUT (5 s), VERIFY_REDIS_URL (redis://127.0.0.1:6379), VERIFY_CODES_URL,"
    " VERIFY_BROKER_URL, VERIFY_RESULTS_URL, VERIFY_QUEUE, VERIFY_MAX_ATTEMPTS (5), VERIFY_CONFIG (an old config.json);"
    " any of them as NAME_FILE for a secret file. OTEL_TRACES_EXPORTER (none; otlp or console) turns traces on."
    " `python -m producer settings` shows all that are in force."
)

app = typer.Typer(
    help="Send email verification codes and check them.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # its tracebacks show local variables: addresses, codes, passwords
)


def _purpose(value: str) -> str:
    if not is_purpose(value):
        raise typer.BadParameter(f"a purpose is {PURPOSE_PATTERN.pattern}")
    return value


Purpose = Annotated[
    str, typer.Option(callback=_purpose, help="What the code is for; a code counts for its purpose only.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.command(epilog=EPILOG)
def send(
    email: Annotated[str, typer.Argument(help="The address that gets the code.")],
    purpose: Purpose = DEFAULT_PURPOSE,
    locale: Annotated[
        str | None, typer.Option(help="Language of the mail: zh-CN or en.", show_default="VERIFY_LOCALE")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a worker to send a code to EMAIL, and wait for its reply."""
    with _client() as (client, settings):
        reply = client.request(email, purpose=purpose, locale=locale)
    _answer(email, reply.error, _SEND.get(reply.error, _unforeseen)(settings), as_json=as_json)


@app.command(epilog=EPILOG)
def check(
    email: Annotated[str, typer.Argument(help="The address, written as it was for `send`.")],
    code: Annotated[str, typer.Argument(help="The code from the mail. A right one is consumed.")],
    purpose: Purpose = DEFAULT_PURPOSE,
    as_json: AsJson = False,
) -> None:
    """Check the CODE that EMAIL got. The right one works once; each check is an attempt."""
    with _client() as (client, settings):
        result = client.check(email, code, purpose=purpose)
    _answer(email, result.error, _CHECK.get(result.error, _unforeseen)(settings), as_json=as_json)


@app.command()
def settings(as_json: AsJson = False) -> None:
    """Show every setting in force by its environment name, secrets masked."""
    shown = load_or_exit().shown()
    if as_json:
        typer.echo(json.dumps(shown, ensure_ascii=False, indent=2))
        return
    for name, value in shown.items():
        _print(Text.assemble((name, "bold"), "=", value))


class LogLevel(StrEnum):
    """How much is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@app.command(epilog=SERVE_EPILOG)
def serve(
    http_bind: Annotated[
        str | None,
        typer.Option(help="Where the HTTP door listens.", metavar="HOST:PORT", show_default="VERIFY_HTTP_BIND"),
    ] = None,
    grpc_bind: Annotated[
        str | None,
        typer.Option(help="Where the gRPC door listens.", metavar="HOST:PORT", show_default="VERIFY_GRPC_BIND"),
    ] = None,
    log_level: Annotated[
        LogLevel, typer.Option(help="How much is logged, on stderr; never a code or a whole address.")
    ] = LogLevel.INFO,
) -> None:
    """Open the doors: HTTP and gRPC in front of the queue."""
    for name, value in (("VERIFY_HTTP_BIND", http_bind), ("VERIFY_GRPC_BIND", grpc_bind)):
        if value is not None:
            os.environ.pop(f"{name}_FILE", None)
            os.environ[name] = value
    in_force = load_or_exit()
    try:
        from producer.api import server as doors  # noqa: PLC0415 - needs what a mere caller does not install
    except ModuleNotFoundError as exc:
        typer.echo(f"The doors need {exc.name}: pip install 'verifyserver[api]'", err=True)
        raise typer.Exit(2) from None
    logs.configure(log_level.upper())
    try:
        doors.serve(in_force)
    except VerifyError as exc:
        typer.echo(str(exc), err=True)
        raise typer.Exit(2) from None


@contextmanager
def _client() -> Iterator[tuple[VerificationClient, Settings]]:
    settings = load_or_exit()
    # The answer says what the library's log lines would: without a handler they would appear on stderr beside it.
    logging.getLogger("producer").addHandler(logging.NullHandler())
    try:
        with VerificationClient(settings) as client:
            yield client, settings
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except VerifyError as exc:
        typer.echo(str(exc), err=True)
        raise typer.Exit(1) from None


def _answer(email: str, error: ErrorCode, said: str, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"email": email, "error": int(error), "name": error.title, "meaning": said}))
    else:
        style = "bold green" if error is ErrorCode.SUCCESS else "bold red"
        shown = email.encode(errors="backslashreplace").decode()  # an argument may hold bytes that are no text
        _print(Text.assemble((error.title, style), f" ({int(error)})  {shown}\n{said}"))
    raise typer.Exit(0 if error is ErrorCode.SUCCESS else 1)


def _print(text: Text) -> None:
    Console(soft_wrap=True, highlight=False).print(text)


_SEND: Final[dict[ErrorCode, Callable[[Settings], str]]] = {
    ErrorCode.SUCCESS: lambda _: "A relay accepted the mail, now or within the cooldown.",
    ErrorCode.REDIS_ERR: lambda s: (
        f"Redis at {_servers(s.broker_url, s.results_url)} cannot be reached, or refused, or the worker's cannot."
        " Is it up? See VERIFY_REDIS_URL."
    ),
    ErrorCode.EXCEPTION: lambda _: "Something unforeseen went wrong in the worker; its log says what.",
    ErrorCode.INVALID_ADDRESS: lambda _: "That is not an email address, or no relay can take its characters.",
    ErrorCode.TOO_MANY_REQUESTS: lambda s: (
        f"This address had its {s.max_sends_per_hour} mails, or the queue is full. Wait, or see"
        " VERIFY_MAX_SENDS_PER_HOUR."
    ),
    ErrorCode.MAIL_REJECTED: lambda _: "The mail was refused for good. Is the mailbox spelt right, does it exist?",
    ErrorCode.TIMEOUT: lambda s: (
        f"No reply within {s.reply_timeout:g} s, or given up; the mail may still arrive. Is a worker running"
        f" (celery -A worker.app worker) on queue {s.queue!r}, and a relay up? Then ask again."
    ),
}
_CHECK: Final[dict[ErrorCode, Callable[[Settings], str]]] = {
    ErrorCode.SUCCESS: lambda _: "The code was right, and is consumed.",
    ErrorCode.REDIS_ERR: lambda s: (
        f"Redis at {_servers(s.codes_url)} cannot be reached, or refused. Is it up? See VERIFY_REDIS_URL."
    ),
    ErrorCode.VARIFY_EXPIRED: lambda _: (
        "No live code for this address and purpose: expired, used, or dropped after too many attempts. Send a new one."
    ),
    ErrorCode.VARIFY_CODE_ERR: lambda s: f"Wrong code. {s.max_attempts} wrong checks drop a code.",
}


def _unforeseen(_settings: Settings) -> str:
    return "A newer worker may know what this means."


def _servers(*urls: str) -> str:
    return " and ".join(dict.fromkeys(mask_url(url) for url in urls))
