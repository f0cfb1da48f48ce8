"""`python docs/tables.py [--check]`: writes the tables of error codes and settings.

Error codes come from producer/contract.py, settings from .env.example. They go to the docs, and the codes' names to the
dashboard. `--check` writes nothing and exits 1 if a file is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from producer.contract import ErrorCode  # noqa: E402 - the checkout is on the path only now

_ERROR: Final = re.compile(r"(?m)^\| (\d+) \| \w+ \| ([^|]+) \|(.*)\n")
_SETTINGS: Final = re.compile(r"(?m)(^## (.+)\n(?:(?!## ).*\n)*?\| name .*\n\|.*\n)(?:\| .*\n)*")


def error_codes(column: str, *, translated: bool = False) -> Callable[[str], str]:
    """A page with the code, its name and this column of the contract; further columns stay as they are.

    A translated page keeps its own words and gets the contract's for a code that it lacks.
    """

    def rewritten(page: str) -> str:
        known = {int(number): (text, rest) for number, text, rest in _ERROR.findall(page)}
        rows = []
        for code in ErrorCode:
            own, rest = known.get(code, ("", ""))
            text = own if own and translated else getattr(code, column)
            rows.append(f"| {int(code)} | {code.title} | {text} |{rest}\n")
        before, after = page[: (start := page.index("\n| 0 |") + 1)], page[start:]
        return before + "".join(rows) + _ERROR.sub("", after)

    return rewritten


def settings(page: str) -> str:
    """The page with a table below each heading that is a section of .env.example."""
    sections = re.split(r"(?m)^# --- (.+) ---$", (ROOT / ".env.example").read_text("utf-8"))
    tables = {}
    for heading, text in zip(sections[1::2], sections[2::2], strict=True):
        entries = re.findall(r"((?:^# .*\n)+?)^(?:# )?(VERIFY_\w+)=(.*)$", text, re.MULTILINE)
        tables[heading] = "".join(
            f"| `{name}` | {f'`{default}`' if default else 'none'} | {_sentence(comment)} |\n"
            for comment, name, default in entries
        )
    return _SETTINGS.sub(lambda found: found[1] + tables[found[2]], page)


def dashboard(page: str) -> str:
    """Grafana's dashboard with a name for each code that workers answer; colours stay as they are."""
    content = json.loads(page)
    [panel] = [panel for panel in content["panels"] if panel["title"] == "Replies by error code"]
    config = panel["fieldConfig"]
    colours = {
        each["matcher"]["options"]: [kept for kept in each["properties"] if kept["id"] != "displayName"]
        for each in config["overrides"]
    }
    config["overrides"] = [
        {
            "matcher": {"id": "byName", "options": number},
            "properties": [*colours.get(number, ()), {"id": "displayName", "value": f"{number} {code.title}"}],
        }
        for code in ErrorCode
        if code < 1000  # others are the API's alone
        for number in [str(int(code))]
    ]
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _sentence(comment: str) -> str:
    return " ".join(line.removeprefix("# ") for line in comment.splitlines())


PAGES: Final = {
    "README.md": error_codes("meaning"),
    "README.zh-CN.md": error_codes("meaning", translated=True),
    "docs/callers.md": error_codes("advice"),
    "docs/callers.zh-CN.md": error_codes("advice", translated=True),
    "docs/settings.md": settings,
    "deploy/grafana/verifyserver.json": dashboard,
}


def main() -> int:
    """Write the tables, or check them."""
    status = 0
    for name, rewrite in PAGES.items():
        path = ROOT / name
        before = path.read_text("utf-8")
        if (after := rewrite(before)) != before:
            if "--check" in sys.argv:
                sys.stderr.write(f"{name} is out of date: make docs\n")
                status = 1
            else:
                path.write_text(after, "utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
