"""Flower as an operator starts it: `celery -A worker.app flower`, and its pages."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

from support.process import HOST, ROOT, START_TIMEOUT, WAIT_TIMEOUT, Process


class FlowerProcess(Process):
    """Flower on a port of its own."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """`environment`: that of a worker."""
        flower = [sys.executable, "-m", "celery", "-A", "worker.app", "flower"]
        options = ["--port=0", f"--address={HOST}", "--debug=true", "--logging=debug", f"--conf={ROOT}/flowerconfig.py"]
        more = {"PYTHONPATH": str(ROOT), "FLOWER_UNAUTHENTICATED_API": "true"}
        super().__init__("flower", [*flower, *options], {**environment, **more})
        self.port = 0

    def wait_until_ready(self) -> None:
        self.wait_for_log("Visit me at", START_TIMEOUT)
        self.wait_for(lambda: re.search(r"Visit me at \S+:\d+\D", self.log))
        self.port = int(re.findall(r"Visit me at \S+:(\d+)", self.log)[-1])

    def get(self, path: str, *, status: int = 200) -> str:
        """A page."""
        return self.ask("GET", path, status=status)

    def api(self, path: str) -> Any:
        """An answer of its API."""
        return json.loads(self.get(path))

    def ask(self, method: str, path: str, body: Any = None, *, status: int = 200) -> str:
        """Any request; the answer's body."""
        with contextlib.closing(http.client.HTTPConnection(HOST, self.port, timeout=WAIT_TIMEOUT)) as connection:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            text = response.read().decode()
            assert response.status == status, (path, response.status)
            return text
