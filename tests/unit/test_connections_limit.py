"""HTTP and gRPC share the files that the process may open."""

from __future__ import annotations

import pytest

from producer.api.server import connections_limit


@pytest.mark.parametrize(("files", "limit"), [(None, 10_000), (1_048_576, 10_000), (20_100, 10_000), (20_000, 9950)])
def test_with_enough_files_each_takes_its_share(
    files: int | None, limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert connections_limit(files) == limit
    assert not caplog.records


@pytest.mark.parametrize(("files", "limit"), [(4096, 1998), (1024, 462), (64, 1)])
def test_with_fewer_both_take_half_and_it_says_so(files: int, limit: int, caplog: pytest.LogCaptureFixture) -> None:
    assert connections_limit(files) == limit
    assert "ulimit" in caplog.text
    assert "20000" in caplog.text
