"""Structured logging that masks every email address, whichever library wrote the line."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import structlog

# What may stand before the @ of an address: RFC 5322's atext and dots, in RFC 6532 anything beyond ASCII too. Also what
# no address has but no separator is, such as a backslash: it may mask too much, not too little.
_LOCAL = r"[^\s@\"<>()\[\],:;\x1b]"
_ADDRESS = rf"(?P<local{{0}}>{_LOCAL}+)@(?P<domain{{0}}>[^\s@\"'<>()\[\]{{{{}}}},:;=\\/\x1b]*)"
# User and password of a URL, or an address, in any library's line. An address is sought only where one may begin, so
# that a long text takes time in proportion to its length. A terminal's colour codes are matched apart, so that they are
# not taken for the beginning of the address they colour.
_PRIVATE = re.compile(
    rf"://(?P<login>[^\s\"<>/?#\x1b]*@)?(?:{_ADDRESS.format(1)})?"
    rf"|(?P<colour>\x1b\[[\d;]*m|(?<!{_LOCAL})){_ADDRESS.format(2)}"
)
_SEPARATORS = " :,[{}]"  # between two strings of JSON
_LONGEST_QUOTED = 1024  # characters of a quoted local part, with the backslashes of several encodings
# The extra fields of our own lines. Other libraries' extras stay out: Celery's hold arguments and results.
_EXTRAS = (
    *("bucket", "count", "email", "error", "key", "kind", "more", "next_try_in", "peer", "protocol", "reason"),
    *("relay", "reply", "request_id", "seconds", "size", "why"),
)

Kind = TypeVar("Kind")


LONGEST_DOMAIN = 253  # characters, RFC 1035, 2.3.4; a longer one is cut


def mask_email(email: object) -> str:
    """`a***@example.com`: the first character and the domain. Anything without an @ becomes `***`."""
    if not isinstance(email, str) or "@" not in email:
        return "***"
    local, _, domain = email.strip().rpartition("@")
    return f"{local[:1]}***@{domain[:LONGEST_DOMAIN]}"


# Names that look like addresses but are not: Celery logs the worker's own node name often.
_node_names: set[str] = set()


def mask_text(text: str) -> str:
    """`text` with every address and every URL's login masked, except this process's node name."""
    if "@" not in text:
        return text
    return _PRIVATE.sub(_masked, _mask_quoted(text) if '"@' in text else text)


def _masked(found: re.Match[str]) -> str:
    before, local, domain = found["colour"], found["local2"], found["domain2"]
    if before is None:
        before, local, domain = "://***@" if found["login"] else "://", found["local1"], found["domain1"]
        if local is None:
            return before
    if local[0] == "'":  # rather Python's quote than the address' own
        before, local = before + "'", local[1:]
    address = f"{local}@{domain}"
    return before + (address if local == "***" or address in _node_names else mask_email(address))


def _mask_quoted(text: str) -> str:
    """`text` with the quoted local parts of addresses masked: `"***@example.com`."""
    kept: list[str] = []
    end = len(text)
    closing = text.rfind('"@')
    while closing >= 0:  # from the right, as a quoted local part may hold such a pair too
        opening = _opening_quote(text, closing)
        if opening >= 0 and text[opening + 1 : closing].strip(_SEPARATORS):
            kept += (text[closing + 1 : end], "***")
            closing, end = opening, opening + 1
        closing = text.rfind('"@', 0, closing)
    return "".join((text[:end], *reversed(kept)))


def _opening_quote(text: str, closing: int) -> int:
    """Where the string that ends at `closing` begins; -1: nowhere."""
    # Each time a text is encoded, a quote gets 0, 1, 3, 7 ... backslashes, and a backslash an even number of them. So
    # one inside the string has more backslashes than the two at its ends, apart from those that end the string itself.
    count = _backslashes(text, closing)
    own = (count ^ (count + 1)) >> 1
    start = max(0, closing - _LONGEST_QUOTED)
    opening = text.rfind('"', start, closing)
    while opening >= 0 and _backslashes(text, opening) > own:
        opening = text.rfind('"', start, opening)
    return opening


def _backslashes(text: str, quote: int) -> int:
    """How many stand before a quote."""
    before = text[max(0, quote - _LONGEST_QUOTED) : quote]
    return len(before) - len(before.rstrip("\\"))


def allow_node_name(name: str) -> None:
    """Leave this node name (`celery@host`) readable in logs."""
    _node_names.add(name)


def _mask_event(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return {key: mask_text(value) if isinstance(value, str) else value for key, value in event.items()}


class LineLimit(Generic[Kind]):
    """Admits so many lines in each period, and hands over at its end how many of which kind it did not admit."""

    def __init__(self, lines: int, period: float, sum_up: Callable[[Counter[Kind]], None]) -> None:
        """`period`: seconds; it begins with the first line, on the running loop. `sum_up` gets at least one."""
        self._lines = lines
        self._period = period
        self._sum_up = sum_up
        self._admitted = 0  # so far in this period
        self._left_out: Counter[Kind] = Counter()
        self._end: asyncio.TimerHandle | None = None

    def admits(self, kind: Kind) -> bool:
        if self._end is None:
            self._end = asyncio.get_running_loop().call_later(self._period, self.flush)
        if self._admitted < self._lines:
            self._admitted += 1
            return True
        self._left_out[kind] += 1
        return False

    def flush(self) -> None:
        """End the period now."""
        if self._end is not None:
            self._end.cancel()
            self._end = None
        self._admitted = 0
        if self._left_out:
            left_out, self._left_out = self._left_out, Counter()
            self._sum_up(left_out)


class _MaskingFormatter(structlog.stdlib.ProcessorFormatter):
    """Masks the finished line, including tracebacks and the `repr` of any object in it."""

    def format(self, record: logging.LogRecord) -> str:
        return mask_text(super().format(record))


def configure(level: int | str = logging.INFO) -> None:
    """Log to stderr for the whole process, other libraries included: coloured on a terminal, else as JSON lines."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.ExtraAdder(_EXTRAS),
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    final: list[structlog.typing.Processor]
    if sys.stderr.isatty():
        final = [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]  # no locals
    else:
        # Not as ASCII: an address in \\u escapes would escape the mask.
        json_lines = structlog.processors.JSONRenderer(ensure_ascii=False)
        final = [structlog.processors.format_exc_info, _mask_event, json_lines]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _MaskingFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
