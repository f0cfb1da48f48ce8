"""The HTML part in a real browser: it fits a phone's width. Needs Chromium."""

from __future__ import annotations

import email
import html
import re
import subprocess
from email.policy import SMTP
from pathlib import Path

import pytest

from producer.setting_types import Sender
from worker.mail.render import Renderer, locales

pytestmark = pytest.mark.tools

CODES = ["482913", "482913482913", "W" * 40]  # ours, the longest of ours, another server's
WIDTHS = [320, 360, 1024]  # CSS pixels; 320 is what WCAG 2.2, 1.4.10 asks for
PAGE = """<!DOCTYPE html><title></title>{frames}
<script>onload = () => {{
  document.title = [...document.querySelectorAll("iframe")].map((frame) => {{
    const page = frame.contentDocument, code = page.querySelector(".code");
    const {{ fontSize, lineHeight }} = frame.contentWindow.getComputedStyle(code);
    const lines = Math.floor(code.clientHeight / parseFloat(lineHeight));  // its padding is less than a line
    const overflow = code.scrollWidth - code.clientWidth;
    return [frame.width, page.documentElement.scrollWidth, overflow, parseFloat(fontSize), lines].join(" ");
  }}).join(", ");
}};</script>"""


@pytest.mark.parametrize("locale", locales())
def test_fits_any_width_and_the_code_is_large(locale: str, tmp_path: Path) -> None:
    renderer = Renderer(Sender("", "no-reply@example.com"), default_locale="zh-CN")
    frames = ""
    for code in CODES:
        raw = renderer.render(recipient="a@example.net", code=code, life=600, request_id="r-1", locale=locale)
        body = email.message_from_bytes(raw, policy=SMTP).get_body(("html",))
        assert body
        markup = html.escape(body.get_content())
        frames += "".join(f'<iframe width="{width}" height="600" srcdoc="{markup}"></iframe>' for width in WIDTHS)
    (tmp_path / "page.html").write_text(PAGE.format(frames=frames), encoding="utf-8")
    measured = subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", str(tmp_path / "page.html")),
        ],
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout.decode()
    found = re.search(r"<title>(.*?)</title>", measured)
    assert found
    frames_measured = [[float(number) for number in frame.split()] for frame in found[1].split(", ")]
    assert len(frames_measured) == len(CODES) * len(WIDTHS)
    for width, needed, overflow, size, _ in frames_measured:
        assert needed <= width
        assert overflow <= 0
        assert size >= 30
    ours = frames_measured[: -len(WIDTHS)]
    assert [lines for *_, lines in ours] == [1] * len(ours)
