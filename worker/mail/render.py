"""The mail that carries a code: templates are prepared once, so that a mail costs one formatting of bytes."""

from __future__ import annotations

import binascii
import hashlib
import html
import re
import time
from datetime import UTC, datetime
from email.header import Header
from email.utils import format_datetime, formataddr
from pathlib import Path
from typing import TYPE_CHECKING, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

if TYPE_CHECKING:
    from producer.setting_types import Sender

LOCALES: Final = ("zh-CN", "en")
MAX_CODE: Final = 256  # characters shown of a code; ours have at most 12 digits, another server may have left any
MAX_MINUTES: Final = 99_999  # a longer life is understated, because six digits would look like a code
MAX_LINE: Final = 998  # octets, RFC 5322, 2.1.1

_TEMPLATES: Final = Path(__file__).parent / "templates"
# In quoted-printable a "=" is always followed by two hex digits or a line end (RFC 2045, 6.7), so neither part can
# contain this.
_BOUNDARY: Final = "=_verification_code"
# What stands for code and minutes while the templates are prepared: private-use characters, which no template holds.
_CODE: Final = "\ue000"
_MINUTES: Final = "\ue001"
_SLOT: Final = re.compile(f"([{_CODE}{_MINUTES}])")
_PLAIN_CODE: Final = re.compile(r"[0-9A-Za-z]{1,32}")  # the same in text, HTML and quoted-printable
# One dot-atom mailbox, which is all that producer.address accepts; so no recipient can end its header or add another.
_MAILBOX: Final = re.compile(r"""[^\s()<>\[\]:;,"\\@\x00-\x20\x7f-\xa0\ud800-\udfff]+@[A-Za-z0-9.-]+""")
_LANGUAGE: Final = re.compile(r"\s*([A-Za-z]{2,3})(?![A-Za-z0-9])")
_FIRST_DOT: Final = re.compile(r"^\.", re.MULTILINE)
_DIGITS_TO_LETTERS: Final = bytes.maketrans(b"0123456789", b"ghijklmnop")

_MESSAGE: Final = """\
Date: %(date)b
From: {sender}
To: %(recipient)b
Subject: {subject}
Message-ID: <%(reference)b@{domain}>
MIME-Version: 1.0
Auto-Submitted: auto-generated
X-Auto-Response-Suppress: All
X-Entity-Ref-ID: %(reference)b
Content-Language: {locale}
Content-Type: multipart/alternative;
 boundary="{boundary}"

--{boundary}
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: quoted-printable

{text}
--{boundary}
Content-Type: text/html; charset=utf-8
Content-Transfer-Encoding: quoted-printable

{html}
--{boundary}--
"""


class Renderer:
    """Makes whole messages from the templates of every locale.

    Thread-safe, and does no I/O after it was made.
    """

    def __init__(self, sender: Sender, *, default_locale: str) -> None:
        """Read and prepare the templates. `default_locale`: one of `LOCALES`, for requests that name none of them."""
        if default_locale not in LOCALES:
            raise ValueError(f"{default_locale!r} is not a locale; allowed: {', '.join(LOCALES)}")
        environment = Environment(
            loader=FileSystemLoader(_TEMPLATES),
            autoescape=select_autoescape(["html"]),
            undefined=StrictUndefined,
        )
        self._default = default_locale
        self._locales = {locale.partition("-")[0]: locale for locale in LOCALES}
        # One minute has its own grammar; every other number shares a message with a slot for it.
        self._messages = {
            (locale, minutes == 1): _prepare(environment, sender, locale, minutes)
            for locale in LOCALES
            for minutes in (1, _MINUTES)
        }
        self._date = (0, b"")

    def render(self, *, recipient: str, code: str, life: float, request_id: str, locale: object) -> bytes:
        """The message with `code`, ready for SMTP's DATA but for the final dot: CRLF lines, dot-stuffed.

        `life`: seconds that the code still lives; shown in minutes. `locale`: whatever the caller sent. All of it is
        7-bit unless `recipient` is not ASCII. Raises `ValueError` for a `recipient` that cannot stand in a header.
        """
        minutes = _minutes(life)
        text, markup = _encode_code(code)
        return self._messages[self._known(locale), minutes == 1] % {
            b"date": self._now(),
            b"recipient": _header_mailbox(recipient),
            b"reference": _reference(request_id),
            b"text_code": text,
            b"html_code": markup,
            b"minutes": b"%d" % minutes,
        }

    def _known(self, locale: object) -> str:
        """The locale we have for the language of `locale`: `EN`, `en_US.UTF-8` and `en-GB,en;q=0.9` are all English."""
        found = _LANGUAGE.match(locale) if isinstance(locale, str) else None
        return self._locales.get(found[1].lower(), self._default) if found else self._default

    def _now(self) -> bytes:
        now = int(time.time())
        second, text = self._date
        if second != now:
            text = format_datetime(datetime.fromtimestamp(now, UTC)).encode()
            self._date = (now, text)
        return text


def _prepare(environment: Environment, sender: Sender, locale: str, minutes: int | str) -> bytes:
    """The message in one locale as a bytes format, with slots for what differs from mail to mail."""

    def body(name: str, code_slot: str) -> str:
        slots = {_CODE: _slot(code_slot), _MINUTES: _slot("minutes")}
        shown = environment.get_template(f"{locale}/{name}").render(code=_CODE, minutes=minutes)
        return "".join(slots.get(piece) or _literal(_quote(piece)) for piece in _SLOT.split(shown))

    subject = environment.get_template(f"{locale}/subject.txt").render()
    message = _MESSAGE.format(
        sender=_literal(_from(sender)),
        subject=_literal(_header_text(subject, "Subject")),
        domain=_literal(sender.mailbox.rpartition("@")[2]),
        locale=locale,
        boundary=_BOUNDARY,
        text=body("body.txt", "text_code"),
        html=body("body.html", "html_code"),
    )
    return _crlf(message)


def _slot(name: str) -> str:
    # Alone between two soft line breaks: no line grows too long, and what follows begins a line too.
    return f"=\n%({name})b=\n"


def _literal(text: str) -> str:
    return text.replace("%", "%%")


def _crlf(text: str) -> bytes:
    return text.replace("\n", "\r\n").encode()


def _quote(text: str) -> str:
    """`text`, which is to begin a line, in quoted-printable with LF lines, dot-stuffed (RFC 5321, 4.5.2)."""
    return _FIRST_DOT.sub("..", binascii.b2a_qp(text.encode(), istext=True).decode())


def _encode_code(code: str) -> tuple[bytes, bytes]:
    """`code` as it stands in the text and in the HTML part. What cannot be shown on one line becomes U+FFFD."""
    if _PLAIN_CODE.fullmatch(code):
        plain = code.encode()
        return plain, plain
    shown = _printable(code[:MAX_CODE]) + ("…" if len(code) > MAX_CODE else "")
    return _crlf(_quote(shown)), _crlf(_quote(html.escape(shown)))


def _printable(text: str) -> str:
    """`text` without line ends, control and invisible characters and lone surrogates: U+FFFD in their place."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _minutes(life: float) -> int:
    """`life` seconds in minutes, rounded to the nearest, at least 1."""
    return int(min(max(1, life / 60 + 0.5), MAX_MINUTES))


def _reference(request_id: str) -> bytes:
    """128 bits of the request id's hash: the same for every try of one request, and nothing to learn the id from.

    In letters alone, because a program that looks for a code in the whole message must not find digits here.
    """
    digest = hashlib.sha256(request_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return digest.encode().translate(_DIGITS_TO_LETTERS)  # six times as quick as a text's


def _header_mailbox(mailbox: str) -> bytes:
    octets = mailbox.encode() if _MAILBOX.fullmatch(mailbox) else b""
    if not octets or len("To: ") + len(octets) > MAX_LINE:
        # The message never repeats the address.
        raise ValueError("the address cannot stand in a header")
    return octets


def _header_text(text: str, header: str) -> str:
    """`text` as it is if it can be, else in encoded words (RFC 2047), folded."""
    if text.isascii() and "=?" not in text and len(text) < 60:
        return text
    return Header(text, "utf-8", header_name=header).encode()


def _from(sender: Sender) -> str:
    mailbox = _header_mailbox(sender.mailbox).decode()
    name = _printable(sender.name)
    shown = _header_text(name, "From")
    return formataddr((name, mailbox)) if shown == name else f"{shown}\n <{mailbox}>"
