"""Calls the API as its callers do: JSON over HTTP, and the old server's gRPC method."""

from __future__ import annotations

import http.client
import json
import os
import urllib.request
from typing import Any

# Read when gRPC's core is loaded: it would write lines of its own between ours.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc

from producer.api.proto import METHOD, SERVICE, GetVarifyReq, GetVarifyRsp
from producer.errors import VerifyError

_MARGIN = 5.0  # seconds beyond the reply timeout, within which the API answers


class NoAnswer(VerifyError):
    """The API did not answer."""


class ApiClient:
    """Calls one API process."""

    def __init__(self, http: str, grpc_bind: str, *, reply_timeout: float) -> None:
        """`http`: the URL of the HTTP API; `grpc_bind`: `host:port` of the gRPC API."""
        self.http = http
        self.grpc = grpc_bind
        self._timeout = reply_timeout + _MARGIN
        # No proxy: both ends are on this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(self, path: str, **content: str) -> dict[str, Any]:
        """The answer to a POST of a JSON object. Raises `NoAnswer`."""
        request = urllib.request.Request(self.http + path, json.dumps(content).encode())  # noqa: S310 - http
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                answer: dict[str, Any] = json.load(response)
        except (OSError, ValueError, http.client.HTTPException) as exc:
            raise NoAnswer(f"POST {self.http}{path}: {exc}") from exc
        return answer

    def get_varify_code(self, email: str) -> Any:
        """The `GetVarifyRsp` to a gRPC call. Raises `NoAnswer`."""
        with grpc.insecure_channel(self.grpc, options=[("grpc.enable_http_proxy", 0)]) as channel:
            call = channel.unary_unary(
                f"/{SERVICE}/{METHOD}",
                request_serializer=GetVarifyReq.SerializeToString,
                response_deserializer=GetVarifyRsp.FromString,
            )
            try:
                return call(GetVarifyReq(email=email), timeout=self._timeout)
            except grpc.RpcError as exc:
                raise NoAnswer(f"{SERVICE}/{METHOD} at {self.grpc}: {exc.code().name}") from exc
