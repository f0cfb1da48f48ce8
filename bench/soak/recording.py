"""Records a soak as Prometheus sees it: the data of every panel of the dashboard, with the faults, as one JSON file."""

from __future__ import annotations

import json
import math
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Self

from support.api_process import ApiProcess
from support.monitoring import concrete, panels
from support.process import free_port
from support.prometheus_process import PrometheusProcess

from bench.soak.callers import Callers
from bench.soak.faults import WORKERS
from bench.soak.ledger import Ledger

STEP: Final = 2.0  # seconds between two points of a line
WINDOW: Final = "10s"  # of rates
A_SECOND: Final = 4.0  # requests by each protocol
TIMEOUT: Final = 20.0  # seconds for an answer


class Recording:
    """An API server beside the soak's workers, its callers, and a Prometheus that scrapes all of them every second."""

    def __init__(self) -> None:
        self.binds = {f"worker {i}": f"127.0.0.1:{free_port()}" for i in range(WORKERS)}
        self._stack = ExitStack()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._lead = 0.0  # of Unix time before the monotonic clock

    def open(self, settings: dict[str, str], callers: Callers) -> None:
        """Start all of it."""
        self._api = self._stack.enter_context(ApiProcess(settings))
        targets = {
            "verify-worker": list(self.binds.values()),
            "verify-api": [f"127.0.0.1:{self._api.http_port}"],
        }
        self._prometheus = self._stack.enter_context(PrometheusProcess(targets))
        self._lead = time.time() - time.monotonic()
        self._threads = [
            threading.Thread(target=self._ask, args=(callers, by_http), daemon=True) for by_http in (True, False)
        ]

    def begin(self) -> None:
        """Begin to call the API."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Call no more; callers that wait for an answer get it first."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(TIMEOUT)

    def _ask(self, callers: Callers, by_http: bool) -> None:
        while not self._stopping.wait(1 / A_SECOND):
            record = callers.ledger.asking(callers.address("api"), "HTTP API" if by_http else "gRPC API")
            if by_http:
                error = self._api.get_code(record.email)["error"]
            else:
                error = self._api.call(record.email, timeout=TIMEOUT).error
            callers.answered(record, error)

    def write(self, path: Path, ledger: Ledger, seconds: float) -> None:
        """Write the first `seconds` of the soak to a file."""
        start = ledger.began + self._lead
        found = [self._panel(panel, start, start + seconds) for panel in panels()]
        faults = [
            {
                "kind": window.kind,
                "where": window.where,
                "start": window.start - ledger.began,
                "end": min(window.end - ledger.began, seconds),
            }
            for window in ledger.windows
        ]
        version = self._prometheus.ask("status/buildinfo")["version"]
        recorded = {"seconds": seconds, "window": WINDOW, "prometheus": version, "faults": faults, "panels": found}
        path.write_text(json.dumps(recorded))

    def _panel(self, panel: dict[str, Any], start: float, end: float) -> dict[str, Any]:
        lines = []
        for target in panel["targets"]:
            for labels, points in self._prometheus.history(concrete(target["expr"], WINDOW), start, end, STEP):
                name = target["legendFormat"]
                for label, value in labels.items():
                    name = name.replace(f"{{{{{label}}}}}", value)
                # JSON has no NaN: None, a gap in the line.
                moments = [(at - start, value if math.isfinite(value) else None) for at, value in points]
                lines.append({"name": name, "labels": labels, "points": moments})
        return {key: panel[key] for key in ("title", "type", "gridPos", "fieldConfig")} | {"lines": lines}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._stack.close()
