"""Asks the gRPC API for a code, with the packages `grpcio` and `grpcio-tools`.

python ask_grpc.py a@example.com

API_KEY is a key of the API, where it asks for one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import grpc

# Seconds. The API answers within VERIFY_REPLY_TIMEOUT; the other five are for an API that is down.
TIMEOUT = float(os.environ.get("VERIFY_REPLY_TIMEOUT", "5")) + 5
API = os.environ.get("GRPC_API", "127.0.0.1:50051")
KEY = os.environ.get("API_KEY")
PROTO = Path(__file__).parent.parent / "producer" / "api" / "message.proto"  # copy it into your own project

sys.path.insert(0, str(PROTO.parent))
message, service = grpc.protos_and_services(PROTO.name)

if __name__ == "__main__":
    with grpc.insecure_channel(API) as channel:
        request = message.GetVarifyReq(email=sys.argv[1])
        metadata = [("authorization", f"Bearer {KEY}")] if KEY else None
        try:
            reply = service.VarifyServiceStub(channel).GetVarifyCode(request, timeout=TIMEOUT, metadata=metadata)
        except grpc.RpcError as exc:
            sys.exit(f"no reply: {exc.code()}")
    print(json.dumps({"email": reply.email, "error": reply.error}))
    sys.exit(0 if reply.error == 0 else 1)
