"""The command line: `send`, `check`, `settings` and `serve`."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.text import Text

from producer import logs, masking
from producer.client import VerificationClient
from producer.contract import DEFAULT_PURPOSE, LONGEST_CLIENT, PURPOSE_PATTERN, ErrorCode, is_client, is_purpose
from producer.errors import VerifyError
from producer.redis.connection import REDIS_TIMEOUT, RedisConnections, raise_errors
from producer.setting_types import Bind, mask_url, parse_bind
from producer.settings import Settings, load_or_exit
from producer.store.backlog import Backlog, backlog, read_backlog

INTERRUPTED: Final = 130  # exit status of a program that Ctrl-C ended

_REDIS_SETTINGS: Final = (
    "VERIFY_REDIS_URL (default redis://127.0.0.1:6379), VERIFY_REDIS_PASSWORD, VERIFY_CODES_URL, VERIFY_BROKER_URL,"
    " VERIFY_RESULTS_URL, VERIFY_QUEUE, VERIFY_REPLY_TIMEOUT (seconds), VERIFY_CONFIG (a config.json of the Node"
    " server)"
)
_SETTINGS_END: Final = "Each also as NAME_FILE for a secret file. `python -m producer settings` shows all settings."
EPILOG: Final = (
    "Exit status: 0 on Success; 1 on any other error code; 2 on wrong usage or a bad setting; 130 on Ctrl-C.\n\n"
    f"Error codes: {', '.join(f'{int(e)} {e.title}' for e in ErrorCode if e is not ErrorCode.ERROR_JSON)}.\n\n"
    f"Settings, from the environment or .env: {_REDIS_SETTINGS}. {_SETTINGS_END}"
)
SERVE_EPILOG: Final = (
    "SIGTERM or Ctrl-C stops the API once it has answered what it accepted, within 10 s; a second one stops it at once."
    " Exit status: 0 after such a stop; 2 on a bad setting, an address where it may not listen, or a busy port.\n\n"
    "To replace the API without a refused connection, start the new one with the same settings and --share-port, as the"
    " old one was, and stop the old one once the new one listens.\n\n"
    "HTTP: POST /get_varifycode, POST /check_varifycode, GET /healthz, /readyz, /metrics, /docs. gRPC:"
    " message.VarifyService/GetVarifyCode, health, reflection.\n\n"
    "Settings, from the environment or .env: VERIFY_HTTP_BIND (default 127.0.0.1:8081), VERIFY_GRPC_BIND"
    " (127.0.0.1:50051), VERIFY_API_KEYS (name:key,name:key; both then ask for one), VERIFY_TLS_CERT, VERIFY_TLS_KEY,"
    " VERIFY_TLS_CLIENT_CA (PEM files; both then speak TLS), VERIFY_ALLOW_PLAINTEXT (1: listen"
    " beyond loopback without keys, or without TLS and a warning), VERIFY_MAX_QUEUE (100000; beyond it the API answers"
    f" TooManyRequests), VERIFY_MAX_ATTEMPTS (5), {_REDIS_SETTINGS}. OTEL_TRACES_EXPORTER (otlp or console) turns"
    f" traces on. {_SETTINGS_END}"
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
        raise typer.BadParameter(f"a purpose matches {PURPOSE_PATTERN.pattern}")
    return value


def _client_word(value: str | None) -> str | None:
    if not is_client(value):
        raise typer.BadParameter(f"at most {LONGEST_CLIENT} characters")
    return value


def _bind(value: str) -> Bind:
    try:
        return parse_bind(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is not allowed; allowed: host:port") from None


Purpose = Annotated[str, typer.Option(callback=_purpose, help="What the code is for. A code is valid for its purpose.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command(epilog=EPILOG)
def send(
    email: Annotated[str, typer.Argument(help="The address that gets the code.")],
    purpose: Purpose = DEFAULT_PURPOSE,
    locale: Annotated[
        str | None, typer.Option(help="Language of the mail, such as en or zh-CN.", show_default="VERIFY_LOCALE")
    ] = None,
    client_word: Annotated[
        str | None,
        typer.Option("--client", callback=_client_word, help="Your word for the end user, who has limits of its own."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send a code to EMAIL and wait for the worker's reply."""
    detail = None
    with _client() as (client, settings, warnings):
        error = client.request(email, purpose=purpose, locale=locale, client=client_word).error
        if error is ErrorCode.REDIS_ERR:
            detail = _servers(settings.broker_url, settings.results_url)
        elif error is ErrorCode.TIMEOUT:
            detail = _why_no_reply(settings, asyncio.run(_backlog(settings)))
    _answer(email, error, warnings, detail, as_json=as_json)


@app.command(epilog=EPILOG)
def check(
    email: Annotated[str, typer.Argument(help="The address, written as it was for `send`.")],
    code: Annotated[str, typer.Argument(help="The code from the mail. The right one works once.")],
    purpose: Purpose = DEFAULT_PURPOSE,
    as_json: AsJson = False,
) -> None:
    """Check the CODE that EMAIL received. Each wrong check counts as an attempt."""
    with _client() as (client, settings, warnings):
        error = client.check(email, code, purpose=purpose).error
    details = {ErrorCode.REDIS_ERR: _servers(settings.codes_url)}
    _answer(email, error, warnings, details.get(error), as_json=as_json)


@app.command()
def settings(as_json: AsJson = False) -> None:
    """Show every setting in force under its environment name, with secrets masked."""
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
        typer.Option(help="Where the HTTP API listens.", metavar="HOST:PORT", show_default="VERIFY_HTTP_BIND"),
    ] = None,
    grpc_bind: Annotated[
        str | None,
        typer.Option(help="Where the gRPC API listens.", metavar="HOST:PORT", show_default="VERIFY_GRPC_BIND"),
    ] = None,
    share_port: Annotated[
        bool,
        typer.Option(
            "--share-port",
            help="Listen together with other processes that have this option. So a new one can replace an old one"
            " without a refused connection, and several can use several cores. Linux only.",
        ),
    ] = False,
    probe_bind: Annotated[
        Bind | None,
        typer.Option(
            help="Where this process alone answers HTTP, too: for probes and metrics.",
            metavar="HOST:PORT",
            parser=_bind,
        ),
    ] = None,
    log_level: Annotated[
        LogLevel, typer.Option(help="How much to log to stderr. No level logs a code or a whole address.")
    ] = LogLevel.INFO,
) -> None:
    """Run the API: HTTP and gRPC in front of the queue."""
    for name, value in (("VERIFY_HTTP_BIND", http_bind), ("VERIFY_GRPC_BIND", grpc_bind)):
        if value is not None:
            os.environ.pop(f"{name}_FILE", None)
            os.environ[name] = value
    in_force = load_or_exit()
    try:
        from producer.api import server  # noqa: PLC0415 - needs the extra `api`
    except ModuleNotFoundError as exc:
        typer.echo(f"The API needs {exc.name}: pip install 'verifyserver[api]'", err=True)
        raise typer.Exit(2) from None
    logs.configure(log_level.upper())
    try:
        server.serve(in_force, share_port=share_port, probe_bind=probe_bind)
    except VerifyError as exc:
        typer.echo(str(exc), err=True)
        raise typer.Exit(2) from None


class _Warnings(logging.Handler):
    """Collects what the client logs, which says why a reply is RedisErr."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(masking.mask_text(record.getMessage()))


@contextmanager
def _client() -> Iterator[tuple[VerificationClient, Settings, list[str]]]:
    settings = load_or_exit()
    warnings = _Warnings()
    logging.getLogger("producer").addHandler(warnings)
    try:
        with VerificationClient(settings) as client:
            yield client, settings, warnings.lines
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except VerifyError as exc:
        typer.echo(str(exc), err=True)
        raise typer.Exit(1) from None


def _answer(email: str, error: ErrorCode, warnings: list[str], detail: str | None, *, as_json: bool) -> None:
    # What the client logged is more precise than the table. Success needs no advice.
    said = [*(warnings or [error.meaning]), *([detail] if detail else [])]
    said += [] if error is ErrorCode.SUCCESS else [error.advice]
    if as_json:
        typer.echo(json.dumps({"email": email, "error": int(error), "name": error.title, "meaning": " ".join(said)}))
    else:
        style = "bold green" if error is ErrorCode.SUCCESS else "bold red"
        shown = email.encode(errors="backslashreplace").decode()  # an argument may hold bytes that are not UTF-8
        _print(Text.assemble((error.title, style), f" ({int(error)})  {shown}\n", "\n".join(said)))
    raise typer.Exit(0 if error is ErrorCode.SUCCESS else 1)


def _print(text: Text) -> None:
    Console(soft_wrap=True, highlight=False).print(text)


async def _backlog(settings: Settings) -> Backlog | None:
    """The queue's backlog within 3 s; None if Redis does not tell."""
    try:
        async with asyncio.timeout(REDIS_TIMEOUT), RedisConnections() as redis:
            [answer] = raise_errors(await redis.connection(settings.broker_url).run([backlog(settings.queue)]))
            return read_backlog(answer)
    except (OSError, VerifyError):  # TimeoutError is an OSError
        return None


def _why_no_reply(settings: Settings, found: Backlog | None) -> str:
    if found is not None and not found.workers:
        return f"No worker is alive on queue {settings.queue!r}: start one with `celery -A worker.app worker`."
    if found is not None and found.unhealthy_workers >= found.workers:
        return "No worker has a healthy relay: check VERIFY_RELAYS and the worker's log."
    return f"Waited {settings.reply_timeout:g} s (VERIFY_REPLY_TIMEOUT) for the reply."


def _servers(*urls: str) -> str:
    return f"Redis: {' and '.join(dict.fromkeys(mask_url(url) for url in urls))}"
