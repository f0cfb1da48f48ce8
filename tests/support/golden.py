"""The golden wire files in `tests/contract`: read them, fill them in, compare them with real messages."""

from __future__ import annotations

import base64
import json
import re
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

DIRECTORY: Final = Path(__file__).parents[1] / "contract"
_PLACEHOLDER: Final = re.compile(r"<(uuid|email|tag|any|seconds|time)([+-]\d+)?>")
_CLOSE: Final = 120.0  # seconds between a time in a file and one that was just written


def files(kind: str) -> dict[str, dict[str, Any]]:
    """The files with `kind` (`push` or `stored`) among their fields, by name."""
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(DIRECTORY.glob("*.json"))}
    return {name: content for name, content in found.items() if kind in content}


def raw(file: dict[str, Any], blanks: Blanks) -> bytes:
    """The message of a file as it goes onto the queue."""
    message = blanks.fill(file["push"])
    if "bytes" in file:
        message["fill"] = "x" * (file["bytes"] - len(json.dumps(message | {"fill": ""})))
    return message.encode() if isinstance(message, str) else json.dumps(message).encode()


@dataclass
class Blanks:
    """The values of one file's placeholders."""

    email: str
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))
    tag: str = field(default_factory=lambda: str(uuid.uuid4()))
    any: str = "any"

    def fill(self, golden: Any) -> Any:
        """The golden value with its placeholders filled in."""
        if isinstance(golden, list):
            return [self.fill(each) for each in golden]
        if isinstance(golden, dict) and set(golden) == {"base64"}:
            inner = self.fill(golden["base64"])
            return base64.b64encode((inner if isinstance(inner, str) else json.dumps(inner)).encode()).decode()
        if isinstance(golden, dict):
            return {name: self.fill(each) for name, each in golden.items()}
        if isinstance(golden, str) and (alone := _PLACEHOLDER.fullmatch(golden)) and alone[1] == "seconds":
            return _moment(alone)
        return _PLACEHOLDER.sub(self._one, golden) if isinstance(golden, str) else golden

    def _one(self, found: re.Match[str]) -> str:
        if found[1] == "time":
            return datetime.fromtimestamp(_moment(found), UTC).isoformat()
        return str(getattr(self, found[1]))

    def assert_equal(self, golden: Any, actual: Any) -> None:
        """`actual` is what the file says, but for times and for what it leaves open (`<tag>`, `<any>`)."""
        if isinstance(golden, dict) and set(golden) == {"base64"}:
            self.assert_equal(golden["base64"], json.loads(base64.b64decode(actual, validate=True)))
        elif isinstance(golden, dict):
            assert isinstance(actual, dict)
            assert set(actual) == set(golden)
            for name, each in golden.items():
                self.assert_equal(each, actual[name])
        elif isinstance(golden, list):
            assert isinstance(actual, list)
            assert len(actual) == len(golden)
            for each, other in zip(golden, actual, strict=True):
                self.assert_equal(each, other)
        elif isinstance(golden, str) and (alone := _PLACEHOLDER.fullmatch(golden)):
            self._assert_fits(alone, actual)
        else:
            expected = self.fill(golden)
            assert (type(actual), actual) == (type(expected), expected)

    def _assert_fits(self, blank: re.Match[str], actual: Any) -> None:
        if blank[1] == "seconds":
            assert isinstance(actual, (int, float))
            assert abs(actual - _moment(blank)) < _CLOSE
        elif blank[1] == "time":
            assert abs(datetime.fromisoformat(actual).timestamp() - _moment(blank)) < _CLOSE
        elif blank[1] == "tag":
            uuid.UUID(actual)
        elif blank[1] == "any":
            assert isinstance(actual, str)
        else:
            assert actual == getattr(self, blank[1])


def _moment(found: re.Match[str]) -> float:
    return time.time() + int(found[2] or 0)
