"""`python -m worker`: `dead` lists, shows, replays and drops dead letters; `erase` removes an address."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from redis import AuthenticationError, RedisError

from producer.contract import DEAD_LETTERS
from producer.errors import RedisLoginRefused, RedisUnavailable, VerifyError
from producer.setting_types import mask_url
from producer.settings import load_or_exit
from worker.celery_side.redis_urls import connect
from worker.erase import KINDS, Eraser
from worker.queue.dead_letters import DeadLetter, DeadLetters

TIMEOUT = 3.0  # seconds for Redis to answer
ERASE_TIMEOUT = 10.0  # likewise; `erase` asks for more, of a server that may be busy

app = typer.Typer(
    help="Commands for whoever runs the workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # its tracebacks show local variables: addresses, passwords
)
dead = typer.Typer(
    no_args_is_help=True,
    help=f"Messages that could not be executed: the Redis list {DEAD_LETTERS} in the broker database"
    " (VERIFY_BROKER_URL). Addresses are masked, and no code is shown.",
)
app.add_typer(dead, name="dead")

_NAMES = typer.Argument(help="Names as `list` shows them.", show_default=False)
Names = Annotated[list[str], _NAMES]
MaybeNames = Annotated[list[str] | None, _NAMES]
All = Annotated[bool, typer.Option("--all", help="All dead letters.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]


@contextmanager
def _letters() -> Iterator[DeadLetters]:
    settings = load_or_exit()
    with _errors_of(settings.broker_url):
        yield DeadLetters(connect(settings.broker_url, timeout=TIMEOUT), settings.queue)


@contextmanager
def _errors_of(*urls: str) -> Iterator[None]:
    where = " or ".join(dict.fromkeys(f"Redis at {mask_url(url)}" for url in urls))
    try:
        yield
    except AuthenticationError:
        raise RedisLoginRefused(f"{where} refused the login: check its user and password") from None
    except RedisError as exc:
        raise RedisUnavailable(f"{where} cannot be used ({type(exc).__name__}): is it up?") from None


def _say(text: str) -> None:
    """Print one line, whatever control characters are in `text`."""
    typer.echo("".join(each if each.isprintable() else ascii(each)[1:-1] for each in text))


@dead.command("list")
def list_letters(
    most: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 100, as_json: AsJson = False
) -> None:
    """Show the name, time, code, reason, masked address and request id of each."""
    with _letters() as letters:
        found, count = letters.list(most), letters.count()
    for letter in found:
        fields = letter.fields()
        if as_json:
            typer.echo(json.dumps(fields))
            continue
        # Three short lines: a table would be wider than a terminal.
        _say(f"{letter.name}  {letter.at:%Y-%m-%dT%H:%M:%SZ}  {fields['email'] or '-'}")
        _say(f"    {fields['code'] or '-'}: {fields['reason']}")
        _say(f"    request {fields['id'] or '-'}")
    if as_json:
        return
    if not found:
        typer.echo("no dead letters")
    elif count > len(found):
        typer.echo(f"{count - len(found)} more: --most {count}")


@dead.command()
def show(names: Names, as_json: AsJson = False) -> None:
    """Show the envelope of each, without its body."""
    with _letters() as letters:
        for name in names:
            letter = letters.find(name)
            if as_json:
                typer.echo(json.dumps({**letter.fields(), "envelope": letter.envelope()}))
                continue
            for key, value in letter.fields().items():
                _say(f"{key}: {value}")
            typer.echo(letter.envelope())


@dead.command()
def replay(names: MaybeNames = None, every: All = False) -> None:
    """Put them back on the queue. A request with an answer keeps it; one past its deadline is answered 6, unsent."""
    failed = 0
    with _letters() as letters:
        for letter in _chosen(letters, names, every):
            try:
                letters.replay(letter)
                typer.echo(f"{letter.name}: back on the queue")
            except VerifyError as exc:
                failed += 1
                typer.echo(f"{letter.name}: {exc}", err=True)
    raise typer.Exit(1 if failed else 0)


@dead.command()
def drop(names: MaybeNames = None, every: All = False) -> None:
    """Delete them for good."""
    with _letters() as letters:
        for letter in _chosen(letters, names, every):
            letters.drop(letter)
            typer.echo(f"{letter.name}: dropped")


def _chosen(letters: DeadLetters, names: list[str] | None, every: bool) -> list[DeadLetter]:
    if every == bool(names):
        raise typer.BadParameter("give either names or --all")
    # Oldest first, in the order in which they came.
    return letters.list()[::-1] if every else [letters.find(name) for name in names or ()]


@app.command(
    epilog="Exit status: 0, nothing is left (or there was nothing); 1, Redis cannot be used; 3, something is left, run"
    " it again."
)
def erase(
    email: Annotated[str, typer.Argument(metavar="ADDRESS", help="In any spelling.", show_default=False)],
    wait: Annotated[float, typer.Option(min=0, help="Seconds for workers to finish what they hold of it.")] = 30.0,
) -> None:
    """Remove all that is kept about an address: codes, counts, limits, replies, requests, dead letters.

    Callers and workers may go on. A queued request for it is not sent; its caller is answered 6.

    What a worker holds is finished first. Says how much of each kind was removed.

    Logs hold no whole address. Backups are not touched.
    """
    settings = load_or_exit()
    urls = (settings.codes_url, settings.broker_url, settings.results_url)
    with _errors_of(*urls):
        codes, broker, results = (connect(url, timeout=ERASE_TIMEOUT) for url in urls)
        eraser = Eraser(codes, broker, results, queue=settings.queue, email=email, fold_aliases=settings.fold_aliases)
        done = eraser.erase(wait=wait)
    for kind in KINDS:
        typer.echo(f"{kind}: {done.removed[kind]} removed")
    for kind, count in done.left.items():
        typer.echo(f"left: {count} ({kind}); run it again", err=True)
    raise typer.Exit(3 if done.left else 0)


def main() -> None:
    """Run the command line. An error is one line on stderr, and exit status 1."""
    for stream in (sys.stdout, sys.stderr):
        # A dead letter may hold text that cannot be encoded.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except VerifyError as exc:
        typer.echo(str(exc), err=True)
        raise SystemExit(1) from None
