"""Masks email addresses and the logins of URLs, for logs, events, traces and Flower. Loads no logging library."""

from __future__ import annotations

import re

# What may stand before the @ of an address: RFC 5322's atext and dots and, by RFC 6532, anything beyond ASCII. Also
# characters that no address has but that separate nothing, such as a backslash: rather mask too much than too little.
_LOCAL = r"[^\s@\"<>()\[\],:;\x1b]"
_ADDRESS = rf"(?P<local{{0}}>{_LOCAL}+)@(?P<domain{{0}}>[^\s@\"'<>()\[\]{{{{}}}},:;=\\/\x1b]*)"
# A URL's user and password, or an address, in any library's line. The pattern looks for an address only where one may
# begin, so that the time is proportional to the length of the text. It matches a terminal's colour codes apart, so that
# they do not count as the beginning of the address that they colour.
_PRIVATE = re.compile(
    rf"://(?P<login>[^\s\"<>/?#\x1b]*@)?(?:{_ADDRESS.format(1)})?"
    rf"|(?P<colour>\x1b\[[\d;]*m|(?<!{_LOCAL})){_ADDRESS.format(2)}"
)
_SEPARATORS = " :,[{}]"  # between two strings of JSON
_LONGEST_QUOTED = 1024  # characters of a quoted local part, with the backslashes of several encodings
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
    if local[0] == "'":  # more likely Python's quote than a part of the address
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
    # Encoded 0, 1, 2, 3 ... times, a quote has 0, 1, 3, 7 ... backslashes before it, and a backslash becomes an even
    # number of them. So a quote inside the string has more backslashes before it than the two quotes at its ends, not
    # counting those that the string itself ends with.
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
