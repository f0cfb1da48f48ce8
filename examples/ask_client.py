"""Asks for a code with the blocking client, for threads: needs the package `verifyserver`.

python ask_client.py a@example.com
"""

from __future__ import annotations

import json
import sys

from producer.client import VerificationClient

if __name__ == "__main__":
    with VerificationClient() as client:  # one for the whole process; threads share it
        reply = client.request(sys.argv[1])  # waits at most VERIFY_REPLY_TIMEOUT
    print(json.dumps({"email": reply.email, "error": reply.error}))
    sys.exit(0 if reply.error == 0 else 1)
