"""Prometheus, with the shipped rules and a scrape configuration made from the shipped one. Debian's `prometheus`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import yaml

from support.monitoring import PROMETHEUS, RULES
from support.process import HOST, START_TIMEOUT, WAIT_TIMEOUT, Process, free_port


class PrometheusProcess(Process):
    """One server and its files. `targets`: by job, where to scrape; all else is as shipped, only faster."""

    def __init__(
        self, targets: Mapping[str, Sequence[str]], *, seconds: int = 1, at_once: bool = False, key: str = ""
    ) -> None:
        """`seconds` between two scrapes, and two evaluations of the rules; `at_once`: alerts ignore their `for`; `key`:
        for the API."""
        super().__init__("prometheus")
        folder = self.directory
        configuration = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text("utf-8"))
        beat = f"{seconds}s"
        configuration["global"] = {"scrape_interval": beat, "scrape_timeout": beat, "evaluation_interval": beat}
        for job in configuration["scrape_configs"]:
            assert job.pop("dns_sd_configs")
            job["static_configs"] = [{"targets": list(targets[job["job_name"]])}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        (folder / "api.key").write_text(key)
        for name in RULES:
            text = (PROMETHEUS / name).read_text("utf-8")
            (folder / name).write_text(re.sub(r"(?m)^( +for:) \w+", r"\1 0s", text) if at_once else text)
        self.port = free_port()
        self.command = [
            *("prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"),
            *(f"--web.listen-address={HOST}:{self.port}", "--storage.tsdb.retention.time=1d"),
        ]
        self._http = httpx.Client(base_url=f"http://{HOST}:{self.port}", timeout=WAIT_TIMEOUT, trust_env=False)

    def wait_until_ready(self) -> None:
        assert shutil.which("prometheus"), "Debian's package prometheus is not installed"
        self.wait_for(self._is_ready, START_TIMEOUT)

    def _is_ready(self) -> bool:
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, path: str, **given: Any) -> Any:
        """The answer of its HTTP API, without errors."""
        answer = self._http.get(f"/api/v1/{path}", params=given).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def instant(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series now."""
        data = self.ask("query", query=expr)
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        return [(each["metric"], float(each["value"][1])) for each in data["result"]]

    def history(
        self, expr: str, start: float, end: float, step: float
    ) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
        """Labels, and times with values, of each series; Unix seconds."""
        data = self.ask("query_range", query=expr, start=start, end=end, step=step)
        return [(each["metric"], [(at, float(value)) for at, value in each["values"]]) for each in data["result"]]

    def firing(self) -> set[str]:
        """Names of the alerts that fire now."""
        return {labels["alertname"] for labels, _ in self.instant('ALERTS{alertstate="firing"}')}

    def close(self) -> None:
        """Hang up, kill it, and remove its files."""
        self._http.close()
        super().close()
