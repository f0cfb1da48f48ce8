"""`python -m worker dead`: look at dead letters, send them round again, or drop them."""

from __future__ import annotations

import io
import json
import sys
from typing import Annotated

import typer
from redis import RedisError
from rich.console import Console
from rich.table import Table

from producer.contract import DEAD_LETTERS
from producer.errors import VerifyError
from producer.setting_types import mask_url
from producer.settings import load_or_exit
from worker.celery_side.redis_urls import connect
from worker.queue.dead_letters import DeadLetter, DeadLetters

TIMEOUT = 3.0  # seconds for Redis to answer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="What a worker leaves behind.")
dead = typer.Typer(
    no_args_is_help=True,
    help=f"Messages that could not be executed: the Redis list {DEAD_LETTERS} in the broker database"
    " (VERIFY_BROKER_URL). Addresses are masked; nothing here shows a code.",
)
app.add_typer(dead, name="dead")

Names = Annotated[list[str], typer.Argument(help="Names as `list` shows them.", show_default=False)]
Every = Annotated[bool, typer.Option("--all", help="All there are.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


def _letters() -> DeadLetters:
    settings = load_or_exit()
    return DeadLetters(connect(settings.broker_url, timeout=TIMEOUT), settings.queue)


def _fields(letter: DeadLetter) -> dict[str, object]:
    return {
        "name": letter.name,
        "at": letter.at.isoformat(timespec="seconds"),
        "reason": letter.reason,
        **letter.summary(),
    }


@dead.command("list")
def list_letters(
    most: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 100, as_json: AsJson = False
) -> None:
    """Name, time, reason, request id and masked address of each."""
    letters = _letters()
    found = letters.list(most)
    if as_json:
        for letter in found:
            typer.echo(json.dumps(_fields(letter)))
        return
    if not found:
        typer.echo("no dead letters")
        return
    table = Table(box=None)
    for column in ("name", "at", "reason", "request id", "address"):
        table.add_column(column, no_wrap=column in {"name", "at"}, overflow="fold")
    for letter in found:
        fields = _fields(letter)
        table.add_row(*(str(fields.get(name) or "-") for name in ("name", "at", "reason", "id", "email")))
    Console().print(table)
    if (count := letters.count()) > len(found):
        typer.echo(f"{count - len(found)} more: --most {count}")


@dead.command()
def show(names: Names, as_json: AsJson = False) -> None:
    """The envelope of each, without its body."""
    letters = _letters()
    for name in names:
        letter = letters.find(name)
        if as_json:
            typer.echo(json.dumps({**_fields(letter), "envelope": letter.envelope()}))
            continue
        for key, value in _fields(letter).items():
            typer.echo(f"{key}: {value}")
        typer.echo(letter.envelope())


@dead.command()
def replay(
    names: Annotated[list[str] | None, typer.Argument(help="Names as `list` shows them.", show_default=False)] = None,
    every: Every = False,
) -> None:
    """Put them back on the queue. What has an answer keeps it; what is past its deadline is answered 6, unsent."""
    letters = _letters()
    failed = 0
    for letter in _chosen(letters, names, every):
        try:
            letters.replay(letter)
            typer.echo(f"{letter.name}: back on the queue")
        except VerifyError as exc:
            failed += 1
            typer.echo(f"{letter.name}: {exc}", err=True)
    raise typer.Exit(1 if failed else 0)


@dead.command()
def drop(
    names: Annotated[list[str] | None, typer.Argument(help="Names as `list` shows them.", show_default=False)] = None,
    every: Every = False,
) -> None:
    """Forget them for good."""
    letters = _letters()
    for letter in _chosen(letters, names, every):
        letters.drop(letter)
        typer.echo(f"{letter.name}: dropped")


def _chosen(letters: DeadLetters, names: list[str] | None, every: bool) -> list[DeadLetter]:
    if every == bool(names):
        raise typer.BadParameter("name some, or say --all")
    # Oldest first, as they came.
    return letters.list(letters.count())[::-1] if every else [letters.find(name) for name in names or ()]


def main() -> None:
    """Run the command line; what is wrong is one line, and exit status 1."""
    for stream in (sys.stdout, sys.stderr):
        # A dead letter may hold text that no encoding can write.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except RedisError as exc:
        url = mask_url(load_or_exit().broker_url)
        typer.echo(f"Redis at {url} cannot be used ({type(exc).__name__}): is it up? VERIFY_BROKER_URL", err=True)
        raise SystemExit(1) from None
    except VerifyError as exc:
        typer.echo(str(exc), err=True)
        raise SystemExit(1) from None
