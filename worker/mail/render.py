"""The mail that carries a code. Templates are prepared once, so that a mail costs one formatting of bytes."""

from __future__ import annotations

import binascii
import functools
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

from producer.errors import BadSetting

if TYPE_CHECKING:
    from producer.setting_types import Sender

TEMPLATES: Final = Path(__file__).parent / "templates"  # one folder for each language
MAX_CODE: Final = 256  # characters shown of a code: ours have at most 12 digits, but the original server left any
MAX_MINUTES: Final = 99_999  # six digits would look like a code
MAX_LINE: Final = 998  # octets (RFC 5322, 2.1.1)

# In quoted-printable, "=" is always followed by two hex digits or a line end (RFC 2045, 6.7), so no part contains this.
_BOUNDARY: Final = "=_verification_code"
# Stands for the code while a template is rendered: a private-use character, which no template contains.
_CODE: Final = "\ue000"
_MESSAGES: Final = 256  # prepared messages that are kept, one for each locale and number of minutes
_PLAIN_CODE: Final = re.compile(r"[0-9A-Za-z]{1,32}")  # the same in text, HTML and quoted-printable
# One dot-atom mailbox, all that producer.address accepts: a recipient can neither end its header nor add another.
_MAILBOX: Final = re.compile(r"""[^\s()<>\[\]:;,"\\@\x00-\x20\x7f-\xa0\ud800-\udfff]+@[A-Za-z0-9.-]+""")
_LANGUAGE_TAG: Final = re.compile(r"\s*([A-Za-z]{2,3}(?:[-_][A-Za-z0-9]{1,8}){0,8})(?![A-Za-z0-9])")
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

    Thread-safe, and does no I/O once it is made.
    """

    def __init__(self, sender: Sender, *, default_locale: str, templates: Path = TEMPLATES) -> None:
        """Read the templates. `default_locale`: for requests that name no locale, or one without templates.

        Raises `BadSetting` if `default_locale` has no templates.
        """
        check_locale(default_locale, templates)
        environment = Environment(
            loader=FileSystemLoader(templates), autoescape=select_autoescape(["html"]), undefined=StrictUndefined
        )
        names = locales(templates)
        self._sender = sender
        self._templates = {
            locale: [environment.get_template(f"{locale}/{name}") for name in ("subject.txt", "body.txt", "body.html")]
            for locale in names
        }
        self._default = default_locale
        # By language tag and by language alone, in lower case; of several locales with one language, the default wins.
        self._locales = {locale.lower(): locale for locale in names}
        for locale in (default_locale, *names):
            self._locales.setdefault(locale.lower().partition("-")[0], locale)
        self._message = functools.lru_cache(_MESSAGES)(self._prepare)
        for locale in names:
            self._message(locale, 10)  # a broken template fails here, not with the first mail

    def render(self, *, recipient: str, code: str, life: float, request_id: str, locale: object) -> bytes:
        """The message with `code`, ready for SMTP's DATA but for the final dot: CRLF lines, dot-stuffed.

        `life`: seconds until the code expires; shown in minutes. `locale`: any value that the caller sent. The message
        is 7-bit unless `recipient` is not ASCII. Raises `ValueError` for a `recipient` that cannot stand in a header.
        """
        text, markup = _encode_code(code)
        return self._message(self._best(locale), _minutes(life)) % {
            b"date": _date(int(time.time())),
            b"recipient": _header_mailbox(recipient),
            b"reference": _reference(request_id),
            b"text_code": text,
            b"html_code": markup,
        }

    def _best(self, locale: object) -> str:
        """The locale we have for the language of `locale`: `EN`, `en_US.UTF-8` and `en-GB,en;q=0.9` are all English."""
        found = _LANGUAGE_TAG.match(locale) if isinstance(locale, str) else None
        tag = found[1].lower().replace("_", "-") if found else ""
        while tag:
            if tag in self._locales:
                return self._locales[tag]
            tag = tag.rpartition("-")[0]
        return self._default

    def _prepare(self, locale: str, minutes: int) -> bytes:
        """The message as a bytes format, with slots for what differs from mail to mail."""
        subject, plain, markup = self._templates[locale]
        message = _MESSAGE.format(
            sender=_literal(_from(self._sender)),
            subject=_literal(_header_text(subject.render(), "Subject")),
            domain=_literal(self._sender.mailbox.rpartition("@")[2]),
            locale=locale,
            boundary=_BOUNDARY,
            text=_body(plain.render(code=_CODE, minutes=minutes), "text_code"),
            html=_body(markup.render(code=_CODE, minutes=minutes), "html_code"),
        )
        return _crlf(message)


@functools.lru_cache(1)
def _date(second: int) -> bytes:
    return format_datetime(datetime.fromtimestamp(second, UTC)).encode()


def locales(templates: Path = TEMPLATES) -> list[str]:
    """The mail languages: the names of the folders with templates."""
    return sorted(folder.parent.name for folder in templates.glob("*/subject.txt"))


def check_locale(locale: str, templates: Path = TEMPLATES) -> None:
    """Raise `BadSetting` unless there are templates for `VERIFY_LOCALE`."""
    if locale not in (names := locales(templates)):
        raise BadSetting(f"VERIFY_LOCALE: {locale!r} is not allowed; allowed: {' or '.join(names)}")


def _body(rendered: str, code_slot: str) -> str:
    # The slot stands alone between two soft line breaks: no line grows too long, and the next piece begins a line, too.
    return f"=\n%({code_slot})b=\n".join(_literal(_quote(piece)) for piece in rendered.split(_CODE))


def _literal(text: str) -> str:
    return text.replace("%", "%%")


def _crlf(text: str) -> bytes:
    return text.replace("\n", "\r\n").encode()


def _quote(text: str) -> str:
    """`text`, at the beginning of a line, in quoted-printable with LF lines, dot-stuffed (RFC 5321, 4.5.2)."""
    return _FIRST_DOT.sub("..", binascii.b2a_qp(text.encode(), istext=True).decode())


def _encode_code(code: str) -> tuple[bytes, bytes]:
    """`code` for the text and for the HTML part. What cannot be shown on one line becomes U+FFFD."""
    if _PLAIN_CODE.fullmatch(code):
        plain = code.encode()
        return plain, plain
    shown = _printable(code[:MAX_CODE]) + ("…" if len(code) > MAX_CODE else "")
    return _crlf(_quote(shown)), _crlf(_quote(html.escape(shown)))


def _printable(text: str) -> str:
    """`text` with U+FFFD for line ends, control characters, invisible characters and lone surrogates."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _minutes(life: float) -> int:
    """`life` seconds in minutes, rounded to the nearest, at least 1."""
    return int(min(max(1, life / 60 + 0.5), MAX_MINUTES))


def _reference(request_id: str) -> bytes:
    """128 bits of the request id's hash: the same for every attempt of one request, without giving the id away.

    In letters, because a program that searches the whole message for a code must find no digits here.
    """
    digest = hashlib.sha256(request_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return digest.encode().translate(_DIGITS_TO_LETTERS)  # six times as fast as with str


def _header_mailbox(mailbox: str) -> bytes:
    octets = mailbox.encode() if _MAILBOX.fullmatch(mailbox) else b""
    if not octets or len("To: ") + len(octets) > MAX_LINE:
        # The error must not show the address.
        raise ValueError("the address cannot stand in a header")
    return octets


def _header_text(text: str, header: str) -> str:
    """`text` as it is if possible, else in encoded words (RFC 2047), folded."""
    if text.isascii() and "=?" not in text and len(text) < 60:
        return text
    return Header(text, "utf-8", header_name=header).encode()


def _from(sender: Sender) -> str:
    mailbox = _header_mailbox(sender.mailbox).decode()
    name = _printable(sender.name)
    shown = _header_text(name, "From")
    return formataddr((name, mailbox)) if shown == name else f"{shown}\n <{mailbox}>"
