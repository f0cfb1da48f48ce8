"""Asks for a code over gRPC, with `grpcio` and `grpcio-tools`: what protoc makes of message.proto.

python ask_grpc.py a@example.com
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import grpc

TIMEOUT = 10.0  # seconds; the door itself answers within VERIFY_REPLY_TIMEOUT, 5 s unless set
DOOR = os.environ.get("VERIFY_GRPC_DOOR", "127.0.0.1:50051")
PROTO = Path(__file__).parent.parent / "producer" / "api" / "message.proto"  # copy it into your own project

sys.path.insert(0, str(PROTO.parent))
message, service = grpc.protos_and_services(PROTO.name)

if __name__ == "__main__":
    with grpc.insecure_channel(DOOR) as channel:
        asked = message.GetVarifyReq(email=sys.argv[1])
        try:
            reply = service.VarifyServiceStub(channel).GetVarifyCode(asked, timeout=TIMEOUT)
        except grpc.RpcError as exc:
            sys.exit(f"no reply: {exc.code()}")
    print(json.dumps({"email": reply.email, "error": reply.error}))
    sys.exit(0 if reply.error == 0 else 1)
