"""The doors as their callers use them: JSON over HTTP, and the old server's gRPC call."""

from __future__ import annotations

import http.client
import json
import os
import urllib.request
from typing import Any

# gRPC's core would write lines of its own between ours. It reads this when it is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc

from producer.api.proto import METHOD, SERVICE, GetVarifyReq, GetVarifyRsp
from producer.errors import VerifyError

_MARGIN = 5.0  # seconds that a door gets beyond the reply timeout, within which it answers


class NoAnswer(VerifyError):
    """A door did not answer."""


class Doors:
    """Both doors, where they are open."""

    def __init__(self, http: str, rpc: str, *, reply_timeout: float) -> None:
        """`http`: the URL of one; `rpc`: `host:port` of the other."""
        self.http = http
        self.rpc = rpc
        self._patience = reply_timeout + _MARGIN
        # A proxy has no part in a conversation of this machine with itself.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(self, path: str, **content: str) -> dict[str, Any]:
        """The answer to a POST of a JSON object. Raises `NoAnswer`."""
        request = urllib.request.Request(self.http + path, json.dumps(content).encode())  # noqa: S310 - http
        try:
            with self._opener.open(request, timeout=self._patience) as response:
                answer: dict[str, Any] = json.load(response)
        except (OSError, ValueError, http.client.HTTPException) as exc:
            raise NoAnswer(f"POST {self.http}{path}: {exc}") from exc
        return answer

    def get_varify_code(self, email: str) -> Any:
        """The `GetVarifyRsp` to a gRPC call. Raises `NoAnswer`."""
        with grpc.insecure_channel(self.rpc, options=[("grpc.enable_http_proxy", 0)]) as channel:
            call = channel.unary_unary(
                f"/{SERVICE}/{METHOD}",
                request_serializer=GetVarifyReq.SerializeToString,
                response_deserializer=GetVarifyRsp.FromString,
            )
            try:
                return call(GetVarifyReq(email=email), timeout=self._patience)
            except grpc.RpcError as exc:
                raise NoAnswer(f"{SERVICE}/{METHOD} at {self.rpc}: {exc.code().name}") from exc
