"""Email addresses: validation, the form SMTP needs, and the canonical form. Syntax only, no DNS."""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from producer.errors import InvalidAddress

MAX_LENGTH = 254  # RFC 5321, 4.5.3.1.3: a path of 256 octets, less its angle brackets
MAX_GIVEN = 320  # characters, with the spaces around it: keys and replies repeat an address as it was given

_GMAIL = frozenset({"gmail.com", "googlemail.com"})
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = r"(?!..--)[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
# Fast path for everyday addresses: email-validator takes 37 us for one, a fifth of a whole request. The pattern accepts
# a subset of what the library accepts; tests/unit/test_address.py compares the two.
_PLAIN = re.compile(rf"(?=.{{1,64}}@){_ATOM}(?:\.{_ATOM})*@(?=.{{1,253}}\Z)(?:{_LABEL}\.)+[A-Za-z]{{2,63}}", re.ASCII)


class Address(NamedTuple):
    """A valid address in the two forms we need."""

    mailbox: str  # for SMTP: trimmed, domain in its ASCII form; non-ASCII only if the local part is
    canonical: str  # identifies the mailbox: trimmed, NFC, lower case, IDNA domain; dots and plus tags kept

    @property
    def is_canonical(self) -> bool:
        """Whether SMTP gets the canonical form. Another spelling can be another mailbox (RFC 5321, 2.4)."""
        return self.mailbox == self.canonical

    @property
    def needs_smtputf8(self) -> bool:
        """Whether the relay must support SMTPUTF8 (RFC 6531)."""
        return not self.mailbox.isascii()


def is_address(raw: object) -> bool:
    """Whether `parse` accepts it; takes half the time for an everyday address."""
    if isinstance(raw, str) and len(raw) <= MAX_LENGTH and _PLAIN.fullmatch(raw):
        return True
    try:
        parse(raw)
    except InvalidAddress:
        return False
    return True


def parse(raw: object) -> Address:
    """Validate `raw`, with surrounding ASCII spaces trimmed.

    Raises `InvalidAddress`; its message never quotes the input.
    """
    if not isinstance(raw, str):
        raise InvalidAddress("the address is not a string")
    if len(raw) > MAX_GIVEN:
        raise InvalidAddress(f"the address has more than {MAX_GIVEN} characters, spaces included")
    text = raw.strip(" ")
    if not text:
        raise InvalidAddress("the address is empty")
    if len(text) > MAX_LENGTH:
        raise InvalidAddress(f"the address is longer than {MAX_LENGTH} characters")
    if _PLAIN.fullmatch(text):  # ASCII, which NFC leaves as it is
        canonical = text.lower()
        if text == canonical:
            return Address(text, text)
        local, _, domain = text.rpartition("@")
        return Address(f"{local}@{domain.lower()}", canonical)
    local, domain = _by_library(text)
    return Address(f"{local}@{domain}", unicodedata.normalize("NFC", local).lower() + "@" + domain)


def fold_aliases(canonical: str) -> str:
    """The canonical address of the mailbox that this one is probably an alias of.

    Without a plus tag, which most providers deliver to the address before it; at Gmail also without dots.
    """
    local, _, domain = canonical.rpartition("@")
    local = local.partition("+")[0] or local
    if domain in _GMAIL:
        local, domain = local.replace(".", ""), "gmail.com"
    return f"{local}@{domain}"


def _by_library(text: str) -> tuple[str, str]:
    # Few addresses need the library, and importing it makes a client start a tenth slower.
    from email_validator import SPECIAL_USE_DOMAIN_NAMES, EmailNotValidError, validate_email  # noqa: PLC0415

    # The library rejects special-use domains (RFC 6761). Its list is global to the caller's process: we leave it alone
    # and check such a name with a harmless suffix instead.
    domain = text.rpartition("@")[2].lower()
    special = any(domain == name or domain.endswith("." + name) for name in SPECIAL_USE_DOMAIN_NAMES)
    suffix = ".com" if special else ""
    try:
        found = validate_email(text + suffix, check_deliverability=False, strict=True)
    except EmailNotValidError:
        # `from None`: the library's message quotes parts of the address.
        raise InvalidAddress from None
    return found.local_part, found.ascii_domain.removesuffix(suffix)
