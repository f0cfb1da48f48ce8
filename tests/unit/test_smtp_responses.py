"""The reader parses the replies that RFC 5321 allows, in any pieces, and nothing beyond its bounds."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.mail.responses import MAX_LINE, MAX_REPLY, Response, ResponseReader

DIALOGUE = b"220 hi\r\n250-one\r\n250-two 2\r\n250 three\r\n354\r\n550 5.1.1 gone\r\n421 4.7.0 \xff\xfe\r\n"
CODES = [220, 250, 354, 550, 421]


@given(st.lists(st.integers(0, len(DIALOGUE)), max_size=20))
def test_replies_are_the_same_however_they_are_cut(cuts: list[int]) -> None:
    reader = ResponseReader()
    edges = [0, *sorted(cuts), len(DIALOGUE)]
    replies = [r for a, b in itertools.pairwise(edges) for r in reader.feed(DIALOGUE[a:b])]
    assert [reply.code for reply in replies] == CODES
    assert replies[1].lines == [b"one", b"two 2", b"three"]
    assert not reader.broken
    assert not reader.pending


@pytest.mark.parametrize(
    ("text", "enhanced"),
    [
        (b"5.1.1 no such user", "5.1.1"),
        (b"5.1.10", "5.1.10"),
        (b"4.7.650 slow down", "4.7.650"),
        (b"5.1.1.1 no", None),
        (b"3.1.1 no", None),
        (b"5.1 no", None),
        (b"<a@b.cc> 5.1.1", None),
        (b"", None),
    ],
)
def test_the_enhanced_code_is_at_the_beginning_of_the_text(text: bytes, enhanced: str | None) -> None:
    assert Response(550, [text]).enhanced == enhanced


def test_a_reply_does_not_show_its_text() -> None:
    assert "a@b.cc" not in repr(Response(550, [b"a@b.cc unknown"]))


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n",
        b"\r\n",
        b"99 x\r\n",
        b"150 x\r\n",
        b"650 x\r\n",
        b"2500 x\r\n",
        b"250x\r\n",
        b"250-a\r\n251 b\r\n",
        b"250-a\r\nb\r\n",
        b"\xb2\xb5\xb0 ok\r\n",
        b"HTTP/1.1 400 Bad Request\r\n",
        b"250 " + b"x" * MAX_LINE + b"\r\n",
        b"x" * (MAX_LINE + 1),
        b"250-" + b"x" * 1000 + b"\r\n" + b"250-y\r\n" * (MAX_REPLY // 6),
    ],
)
def test_malformed_replies_break_the_reader(data: bytes) -> None:
    reader = ResponseReader()
    assert reader.feed(data) == []
    assert reader.broken


def test_replies_before_a_malformed_line_count() -> None:
    reader = ResponseReader()
    assert [reply.code for reply in reader.feed(b"250 ok\r\nnonsense\r\n250 ok\r\n")] == [250]
    assert reader.broken


def test_a_flood_of_lines_is_bounded() -> None:
    reader = ResponseReader()
    for _ in range(MAX_REPLY):
        reader.feed(b"250-x\r\n")
        if reader.broken:
            break
    assert reader.broken


def test_reset_discards_an_incomplete_reply() -> None:
    reader = ResponseReader()
    reader.feed(b"250-x\r\n25")
    assert reader.pending
    reader.reset()
    assert not reader.pending
    assert [reply.code for reply in reader.feed(b"220 hi\r\n")] == [220]
