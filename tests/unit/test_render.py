"""The mail: what readers, relays and phones can rely on, for any code, address, life and locale."""

from __future__ import annotations

import email
import re
import shutil
from datetime import UTC, datetime, timedelta
from email.header import decode_header, make_header
from email.message import EmailMessage
from email.policy import SMTP
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer import address
from producer.errors import BadSetting
from producer.setting_types import Sender
from worker.mail.render import MAX_CODE, TEMPLATES, Renderer, locales

CODE = "482913"
SENDER = Sender("", "no-reply@example.com")
OURS = ("en", "zh-CN")  # whose texts the tests know; every other check is made for any folder of templates
RENDERER = Renderer(SENDER, default_locale="zh-CN")
TAGS = {"html", "head", "meta", "title", "style", "body", "table", "tr", "td", "h1", "p", "b", "br"}
VOID = {"meta", "br"}
ATTRIBUTES = {
    *("lang", "dir", "charset", "name", "content", "class", "style", "role", "translate"),
    *("width", "align", "border", "cellpadding", "cellspacing"),
}


def mail(renderer: Renderer = RENDERER, **given: Any) -> bytes:
    request: dict[str, Any] = {"recipient": "a@example.net", "code": CODE, "life": 600, "request_id": "r-1"}
    return renderer.render(**({"locale": None} | request | given))


def parse(raw: bytes) -> EmailMessage:
    """`raw` as a reader gets it: the relay takes away what dot-stuffing added."""
    parsed = email.message_from_bytes(re.sub(rb"(?m)^\.", b"", raw), policy=SMTP)
    assert isinstance(parsed, EmailMessage)
    defects = [defect for part in parsed.walk() for defect in part.defects]
    defects += [defect for value in parsed.values() for defect in getattr(value, "defects", ())]
    assert not defects
    return parsed


def header(raw: bytes, name: str) -> str:
    """One header as it is on the wire, its lines included."""
    found = re.search(rf"(?m)^{name}: (.*(?:\r\n[ \t].*)*)\r$", raw.decode())
    assert found
    return found[1]


def parts(message: EmailMessage) -> tuple[str, str]:
    plain, markup = message.iter_parts()
    assert isinstance(plain, EmailMessage)
    assert isinstance(markup, EmailMessage)
    return plain.get_content().replace("\r\n", "\n"), markup.get_content().replace("\r\n", "\n")


class Page(HTMLParser):
    """The tree of one HTML part, with the colours that each text has in light and in dark."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, str] = {}  # class of the element -> its text
        self.contrasts: list[tuple[str, str, float]] = []
        self.dark = dict(re.findall(r"\.(\w+) \{ ([^}]*) \}", markup))
        self._open: list[tuple[str, str, str]] = []  # tag, class, style
        self.feed(markup)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        given = dict(attrs)
        if tag not in VOID:
            self._open.append((tag, given.get("class") or "", given.get("style") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if not data.strip() or self._open[-1][0] in {"style", "title"}:
            return
        name = next(name for _, name, _ in reversed(self._open) if name)
        self.texts[name] = self.texts.get(name, "") + data
        for mode in ("light", "dark"):
            colours = [self._colour(mode, what) for what in ("color", "background-color")]
            self.contrasts.append((data, mode, contrast(*colours)))

    def _colour(self, mode: str, what: str) -> str:
        for _, name, style in reversed(self._open):
            for rules in (self.dark.get(name, "") if mode == "dark" else "", style):
                if found := re.search(rf"(?:^|[ ;]){what}: (#[0-9a-f]{{6}})\b", rules):
                    return found[1]
        raise AssertionError(f"no {what} in {mode}")


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours (WCAG 2.2, 1.4.3)."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def check_wire(raw: bytes) -> None:
    """What SMTP's DATA asks of any message."""
    assert raw.endswith(b"\r\n")
    assert b"\0" not in raw
    lines = raw.split(b"\r\n")
    for line in lines:
        assert b"\r" not in line
        assert b"\n" not in line
        assert len(line) <= 998
        assert not line.startswith(b".") or line.startswith(b"..")
    for line in lines[lines.index(b"") :]:
        assert line.isascii()
        assert len(line.removeprefix(b".")) <= 76  # RFC 2045, 6.7


@pytest.mark.parametrize("locale", locales())
def test_headers(locale: str) -> None:
    message = parse(mail(locale=locale))
    assert sorted(message.keys()) == sorted(
        [
            *("Date", "From", "To", "Subject", "Message-ID", "MIME-Version", "Content-Type", "Content-Language"),
            *("Auto-Submitted", "X-Auto-Response-Suppress", "X-Entity-Ref-ID"),
        ]
    )
    assert message["From"] == "no-reply@example.com"
    assert message["To"] == "a@example.net"
    assert message["MIME-Version"] == "1.0"
    assert message["Auto-Submitted"] == "auto-generated"
    assert message["X-Auto-Response-Suppress"] == "All"
    assert message["Content-Language"] == locale
    assert message["Subject"] == {"zh-CN": "验证码", "en": "Your verification code"}.get(locale, message["Subject"])
    assert message["Message-ID"] == f"<{message['X-Entity-Ref-ID']}@example.com>"


@pytest.mark.parametrize("locale", locales())
def test_two_alternatives_text_first(locale: str) -> None:
    message = parse(mail(locale=locale))
    assert message.get_content_type() == "multipart/alternative"
    kinds = [(part.get_content_type(), part.get_content_charset()) for part in message.iter_parts()]
    assert kinds == [("text/plain", "utf-8"), ("text/html", "utf-8")]
    assert {part["Content-Transfer-Encoding"] for part in message.iter_parts()} == {"quoted-printable"}
    assert mail(locale=locale).count(b"=_verification_code") == 4  # the declaration, two openings, one end


def test_the_whole_text() -> None:
    assert parts(parse(mail(locale="zh-CN")))[0] == (
        "您的验证码是 482913\n\n10 分钟内有效。请勿告诉任何人。\n\n如果您没有申请验证码，请忽略这封邮件。"  # noqa: RUF001
    )
    assert parts(parse(mail(locale="en")))[0] == (
        "Your verification code is 482913\n\nIt is valid for 10 minutes. Never share it with anyone.\n\n"
        "If you did not ask for this code, ignore this email."
    )


@pytest.mark.parametrize("locale", locales())
def test_html_and_text_say_the_same_with_the_code_after_its_title(locale: str) -> None:
    plain, markup = parts(parse(mail(locale=locale)))
    page = Page(markup)
    # Autofill looks for the code behind the word.
    assert list(page.texts)[:2] == ["title", "code"]
    title = page.texts["title"]
    assert title == {"zh-CN": "您的验证码", "en": "Your verification code"}.get(locale, title)
    assert page.texts["code"] == CODE
    spoken = re.sub(r"[\W_]", "", plain)
    for said in page.texts.values():
        for words in re.split(r"[.,。\uff0c]", said):
            assert re.sub(r"[\W_]", "", words) in spoken


@pytest.mark.parametrize("locale", locales())
def test_code_is_the_only_run_of_six_digits_in_the_whole_message(locale: str) -> None:
    raw = mail(locale=locale)
    assert re.findall(rb"\d{6,}", raw) == [CODE.encode()] * 2
    plain, markup = parts(parse(raw))
    assert re.findall(r"\d{6,}", plain) == [CODE]
    assert re.findall(r"\d{6,}", markup) == [CODE]


@pytest.mark.parametrize(
    ("life", "minutes"),
    [
        *((-5, 1), (0, 1), (0.4, 1), (29, 1), (61, 1), (89, 1), (90, 2), (119.9, 2), (149, 2), (151, 3)),
        *((569, 9), (571, 10), (599.97, 10), (600, 10), (86400, 1440), (float("nan"), 1)),
        *((1e9, 99_999), (float("inf"), 99_999)),
    ],
)
def test_life_is_shown_in_minutes(life: float, minutes: int) -> None:
    english = f"{minutes} minute" if minutes == 1 else f"{minutes} minutes"
    for part in parts(parse(mail(life=life, locale="en"))):
        assert re.search(rf"\b{english}\b", part)
        assert len(re.findall(r"\d+ minute", part)) == 1
    for part in parts(parse(mail(life=life, locale="zh-CN"))):
        assert re.findall(r"(\d+) 分钟", part) == [str(minutes)]


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        *(("zh-CN", "zh-CN"), ("zh_CN", "zh-CN"), ("zh", "zh-CN"), ("ZH-hans-cn", "zh-CN"), ("zh_CN.UTF-8", "zh-CN")),
        *(("en", "en"), ("EN", "en"), ("en-US", "en"), ("en_GB", "en"), (" en ", "en"), ("en-GB,en;q=0.9", "en")),
    ],
)
def test_locale_is_understood(asked: str, got: str) -> None:
    for default in locales():
        assert parse(mail(Renderer(SENDER, default_locale=default), locale=asked))["Content-Language"] == got


@pytest.mark.parametrize("default", locales())
@pytest.mark.parametrize(
    "asked",
    [
        *(None, "", "xx", "xx-YY", "english", "e", "enx", "-en", "../en", "中文", "x" * 10**6),
        *(7, True, b"en", ["en"], {"en": "en"}),
    ],
    ids=lambda asked: repr(asked)[:12],
)
def test_any_other_locale_gives_the_default(asked: object, default: str) -> None:
    assert parse(mail(Renderer(SENDER, default_locale=default), locale=asked))["Content-Language"] == default


def test_a_default_locale_without_templates_is_a_bad_setting() -> None:
    with pytest.raises(BadSetting, match=r"^VERIFY_LOCALE: 'xx' is not allowed; allowed: .*\ben\b.*\bzh-CN\b"):
        Renderer(SENDER, default_locale="xx")


def test_a_mail_language_is_one_folder_of_templates(tmp_path: Path) -> None:
    templates = tmp_path / "templates"
    shutil.copytree(TEMPLATES, templates)
    for name, folder in (("pl", "en"), ("zh-TW", "zh-CN")):
        shutil.copytree(templates / folder, templates / name)
    (templates / "pl" / "body.txt").write_text(
        "{{ code }}: {{ minutes }} {{ 'minuta' if minutes == 1 else 'minuty' if minutes in (2, 3, 4) else 'minut' }}"
    )
    renderer = Renderer(SENDER, default_locale="pl", templates=templates)
    for life, text in ((60, "minuta"), (120, "minuty"), (300, "minut")):
        message = parse(mail(renderer, locale="pl-PL", life=life))
        assert message["Content-Language"] == "pl"
        assert parts(message)[0] == f"482913: {life // 60} {text}"
    asked = {
        "zh-TW": "zh-TW",
        "zh_tw.UTF-8": "zh-TW",
        "zh-CN": "zh-CN",
        "zh-Hans-CN": "zh-CN",
        "zh": "zh-CN",
        "x": "pl",
    }
    assert {tag: parse(mail(renderer, locale=tag))["Content-Language"] for tag in asked} == asked


def test_message_id_depends_on_the_request_id_alone() -> None:
    first = parse(mail())["Message-ID"]
    assert parse(mail(code="111111", recipient="b@example.net", life=60, locale="en"))["Message-ID"] == first
    assert parse(mail(request_id="r-2"))["Message-ID"] != first
    # A redelivery may meet another worker, of another release too.
    assert first == "<alfannnajdcmnimocaeameeagjobahkh@example.com>"


@pytest.mark.parametrize("request_id", ["", "a\r\nBcc: x@example.com", "\ud800", "验证" * 1000])
def test_any_request_id_gives_a_message_id(request_id: str) -> None:
    raw = mail(request_id=request_id)
    check_wire(raw)
    assert re.fullmatch(r"<[a-p]{32}@example\.com>", parse(raw)["Message-ID"])


def test_date_is_now_and_moves_on(monkeypatch: pytest.MonkeyPatch) -> None:
    said = parse(mail())["Date"].datetime
    assert abs(datetime.now(UTC) - said) < timedelta(seconds=5)
    for now in (1_790_000_000.0, 1_790_000_000.9, 1_790_000_001.0):
        monkeypatch.setattr("time.time", lambda now=now: now)
        assert parse(mail())["Date"].datetime == datetime.fromtimestamp(int(now), UTC)


@pytest.mark.parametrize(
    "sender",
    [
        Sender("Chat", "no-reply@example.com"),
        Sender('Chat "Beta", Ltd. (EU)', "no-reply@example.com"),
        Sender("back\\slash; <x@example.org>", "no-reply@example.com"),
        Sender("聊天、服务", "no-reply@example.com"),
        Sender("Zoë, “Chat” @ 100%", "no-reply@example.com"),
        Sender("=?utf-8?q?x?=", "no-reply@example.com"),
        Sender("100% {code} %(reference)b", "no-reply@example.com"),
        Sender("名" * 200, "no-reply@example.com"),
        Sender("long name " * 30 + "end", "no-reply@example.com"),
        Sender("", "a" * 64 + "@" + ".".join(["b" * 60] * 3) + ".example.com"),
    ],
    ids=lambda sender: sender.name[:12],
)
def test_a_reader_shows_the_display_name_as_it_was_set(sender: Sender) -> None:
    raw = mail(Renderer(sender, default_locale="en"))
    check_wire(raw)
    assert raw.isascii()
    (found,) = parse(raw)["From"].addresses
    # Python's parser of addresses keeps the blanks between encoded words, against RFC 2047, 6.2.
    names = (found.display_name, str(make_header(decode_header(re.sub(r"\s*<[^>]*>$", "", header(raw, "From"))))))
    assert sender.name in names
    assert found.addr_spec == sender.mailbox
    assert parse(raw)["Message-ID"].endswith("@" + sender.mailbox.partition("@")[2] + ">")


def test_display_name_cannot_add_a_header() -> None:
    message = parse(mail(Renderer(Sender("x\r\nBcc: y@example.com\0", "no-reply@example.com"), default_locale="en")))
    assert message["Bcc"] is None
    assert message["From"].addresses[0].display_name == "x\ufffd\ufffdBcc: y@example.com\ufffd"


@pytest.mark.parametrize("mailbox", ["a\r\nBcc: b@example.com", "", "x", "a@example.com>"])
def test_a_sender_unfit_for_a_header_is_rejected(mailbox: str) -> None:
    with pytest.raises(ValueError, match="cannot stand in a header"):
        Renderer(Sender("", mailbox), default_locale="en")


@pytest.mark.parametrize(
    "raw",
    [
        *("a@example.net", "o'hara+tag.x{y}%25%b=?utf-8?q?x?=@example.net", "123456@qq.com"),
        *("a" * 64 + "@" + ".".join(["b" * 63] * 3)[:180] + ".com", "a@münchen.example", "a@e.org"),
    ],
)
def test_an_ascii_recipient_makes_a_seven_bit_message(raw: str) -> None:
    mailbox = address.parse(raw).mailbox
    made = mail(recipient=mailbox)
    check_wire(made)
    assert made.isascii()
    assert f"\r\nTo: {mailbox}\r\n".encode() in made
    assert not parse(made)["To"].defects


@pytest.mark.parametrize("mailbox", ["用户@example.net", "zoë@example.net", "é" * 100 + "@example.net"])
def test_a_recipient_beyond_ascii_is_utf_8_in_its_header(mailbox: str) -> None:
    made = mail(recipient=mailbox)
    check_wire(made)
    assert f"\r\nTo: {mailbox}\r\n".encode() in made
    assert made.replace(mailbox.encode(), b"").isascii()


@pytest.mark.parametrize(
    "recipient",
    [
        *("a@example.net\r\nBcc: b@example.net", "a@example.net\n", "\ra@example.net", "a\0@example.net", "", "a"),
        *("a@example.net, b@example.net", "A <a@example.net>", "a@b@example.net", "a b@example.net", "a\t@example.net"),
        *("a\x85@example.net", "a\u2028@example.net", "a\x7f@example.net", "a\ud800@example.net", "a@exämple.net"),
        *("a" * 1000 + "@example.net", "é" * 500 + "@example.net"),
    ],
)
def test_the_error_for_a_recipient_unfit_for_a_header_does_not_show_it(recipient: str) -> None:
    with pytest.raises(ValueError, match=r"^the address cannot stand in a header$"):
        mail(recipient=recipient)


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        *(("a3f0", "a3f0"), ("", ""), (".", "."), ("..", ".."), (".\r\n.", ".\ufffd\ufffd."), ("=20", "=20")),
        *(
            ("<b>&\"'</b>", "<b>&\"'</b>"),
            ("</p><script>", "</p><script>"),
            ("&amp;", "&amp;"),
            ("{{ 7*7 }}", "{{ 7*7 }}"),
        ),
        *(("12\r\n34", "12\ufffd\ufffd34"), ("1\x002", "1\ufffd2"), ("1\u20282", "1\ufffd2"), ("1\u202e2", "1\ufffd2")),
        *(
            ("验证", "验证"),
            ("😀", "😀"),
            ("\ud83d", "\ufffd"),
            ("\ue000\ue001", "\ufffd\ufffd"),
            ("%s%(code)b%", "%s%(code)b%"),
        ),
        *((" 12 ", " 12 "), ("--=_verification_code--", "--=_verification_code--"), ("1" * MAX_CODE, "1" * MAX_CODE)),
        *(("'" * 10**6, "'" * MAX_CODE + "…"), ("😀" * 999, "😀" * MAX_CODE + "…"), ("٣٤٥", "٣٤٥")),
    ],
    ids=lambda text: ascii(text)[:12],
)
@pytest.mark.parametrize("locale", OURS)
def test_any_code_is_shown_on_one_line_and_breaks_nothing(code: str, shown: str, locale: str) -> None:
    raw = mail(code=code, locale=locale)
    check_wire(raw)
    assert raw.isascii()
    message = parse(raw)
    assert message.keys() == parse(mail()).keys()
    plain, markup = parts(message)
    first, *others = plain.split("\n")
    assert re.fullmatch(r"(您的验证码是|Your verification code is) (.*)", first)[2] == shown  # type: ignore[index]
    assert others == parts(parse(mail(locale=locale)))[0].split("\n")[1:]
    page = Page(markup)
    assert page.texts.get("code", "") == shown
    assert page.tags == Page(parts(parse(mail(locale=locale)))[1]).tags
    assert len(markup.encode()) <= 12_000
    assert len(raw) <= 12_000


def test_a_line_that_begins_with_a_dot_is_dot_stuffed() -> None:
    raw = mail(code=".5.")
    assert raw.count(b"\r\n..5.=\r\n") == 2
    assert all(".5." in part and "..5." not in part for part in parts(parse(raw)))


@given(
    code=st.text(max_size=300) | st.from_regex(r"[0-9]{4,12}", fullmatch=True) | st.text(".=\r\n \t<&-_%", max_size=90),
    life=st.floats(),
    locale=st.sampled_from([*OURS, None, "xx"]) | st.text(max_size=9) | st.integers(),
    request_id=st.text(max_size=50),
)
def test_both_parts_carry_the_same_code(code: str, life: float, locale: object, request_id: str) -> None:
    raw = mail(code=code, life=life, locale=locale, request_id=request_id)
    check_wire(raw)
    assert raw.isascii()
    plain, markup = parts(parse(raw))
    (shown,) = re.findall(r"\A(?:您的验证码是|Your verification code is) (.*)\n\n", plain)
    assert Page(markup).texts.get("code", "").strip() == shown.strip()
    if code.isprintable() and len(code) <= MAX_CODE:
        assert shown == code
    (minutes,) = re.findall(r"(\d{1,5}) (?:分钟|minutes?)", plain.split("\n")[2])
    assert int(minutes) >= 1
    if 60 <= life <= 86400:
        assert abs(int(minutes) - life / 60) <= 0.5


@pytest.mark.parametrize("locale", locales())
def test_html_is_small_and_fetches_nothing(locale: str) -> None:
    markup = parts(parse(mail(locale=locale)))[1]
    assert len(markup.encode()) <= 12_000
    assert markup.startswith("<!DOCTYPE html>\n")
    page = Page(markup)
    assert set(page.tags) <= TAGS
    assert {name for _, name, _ in page.attributes} <= ATTRIBUTES
    fetching = r"http|www\.|//|url\(|@import|@font-face|javascript|\bsrc|\bhref|expression\("
    assert not re.search(fetching, markup, re.IGNORECASE)
    # Hidden text looks like spam, to SpamAssassin too (STY_INVIS_DIRECT).
    assert not re.search(r"display: *none|visibility|font-size: *0|opacity", markup)


@pytest.mark.parametrize("locale", locales())
def test_html_declares_language_colour_scheme_and_structure(locale: str) -> None:
    markup = parts(parse(mail(locale=locale)))[1]
    page = Page(markup)
    given_values = {(tag, name): value for tag, name, value in page.attributes}
    metas = dict(re.findall(r'<meta name="([^"]+)" content="([^"]+)">', markup))
    assert given_values["html", "lang"] == locale
    assert metas["color-scheme"] == "light dark"
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert "telephone=no" in metas["format-detection"]
    assert ":root { color-scheme: light dark;" in markup
    assert "@media (prefers-color-scheme: dark)" in markup
    assert page.tags.count("table") == page.attributes.count(("table", "role", "presentation"))
    assert page.tags.count("h1") == 1
    assert page.tags.count("title") == 1


@pytest.mark.parametrize("locale", locales())
def test_every_text_has_contrast_in_light_and_dark(locale: str) -> None:
    page = Page(parts(parse(mail(locale=locale)))[1])
    assert {mode for _, mode, _ in page.contrasts} == {"light", "dark"}
    assert set(page.dark) >= set(page.texts)
    assert [found for found in page.contrasts if found[2] < 4.5] == []


def test_every_locale_has_the_same_markup_and_style() -> None:
    shapes = []
    for locale in locales():
        page = Page(parts(parse(mail(locale=locale)))[1])
        styles = [(t, n, re.sub(r"font-family: [^;]*;", "", v)) for t, n, v in page.attributes if n != "lang"]
        shapes.append((page.tags, styles, page.dark))
    assert shapes[0] == shapes[1]


def test_no_file_is_read_after_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer(SENDER, default_locale="en")
    monkeypatch.setattr("builtins.open", None)
    monkeypatch.setattr("io.open", None)
    for locale in (*locales(), "xx"):
        for life in (60, 600):
            mail(renderer, locale=locale, life=life)
