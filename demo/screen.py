"""What the demo prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from demo.catcher import Mail

HEADERS = ("From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted")  # the ones that `mail` shows
_WIDTH = 88


class Screen:
    """Colours and a spinner on a terminal; plain lines elsewhere."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)

    def title(self, text: str) -> None:
        self._console.print()
        self._console.print(Text(text, "bold"))

    def fact(self, name: str, value: str) -> None:
        self._console.print(Text.assemble("  ", (f"{name:<15}", "dim"), value))

    def highlight(self, name: str, value: str, aside: str = "") -> None:
        """A named value that stands out."""
        self._console.print(Text.assemble("  ", (f"{name:<15}", "bold green"), (value, "bold"), (aside, "dim")))

    def done(self, text: str) -> None:
        """A step that succeeded."""
        self._console.print(Text.assemble("  ", ("✓", "green"), " ", text))

    def note(self, text: str) -> None:
        self._console.print(Text(f"  {text}", "dim"))

    def command(self, text: str) -> None:
        """A command to copy, on one line."""
        self._console.print(Text(f"    {text}", "cyan"))

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show `text` while the block runs, on a terminal only."""
        if not self._console.is_terminal:
            yield
            return
        with self._console.status(Text(text, "dim")):
            yield

    def mail(self, mail: Mail) -> None:
        """A mail as its reader sees it: headers and the text part."""
        grid = Table.grid(padding=(0, 2))
        for name in HEADERS:
            if mail.message[name] is not None:
                grid.add_row(Text(name, "dim"), Text(str(mail.message[name])))
        grid.add_row()
        whole = Table.grid()
        whole.add_row(grid)
        whole.add_row(Text(mail.text.strip()))
        panel = Panel(whole, box=box.ROUNDED, border_style="dim", width=min(_WIDTH, self._console.width - 2))
        self._console.print(Padding(panel, (0, 0, 0, 2)), soft_wrap=False)

    def failed(self, step: str, why: str, logs: Mapping[str, str] | None = None) -> None:
        """A step that failed, why, and the ends of these logs by their parts' names."""
        self._console.print(Text.assemble("  ", ("✗", "bold red"), " ", (step, "bold")))
        for line in why.splitlines():
            self._console.print(Text(f"    {line}"))
        for name, log in (logs or {}).items():
            self._console.print(Text(f"    The end of the log of {name}:", "dim"))
            for line in log.splitlines():
                self._console.print(Text(f"      {line}", "dim"))
