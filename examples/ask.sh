#!/bin/sh
# Asks the HTTP API for a code, with curl, and prints the reply.
#
#   sh ask.sh a@example.com
#
# API_KEY is a key of the API, where it asks for one.
set -eu

api=${HTTP_API:-http://127.0.0.1:8081}
email=$(printf %s "$1" | sed 's/[\\"]/\\&/g') # escaped for JSON
# The API answers within VERIFY_REPLY_TIMEOUT (5 s); the 10 s are for an API that is down.
reply=$(curl -sS -m 10 ${API_KEY:+-H "Authorization: Bearer $API_KEY"} "$api/get_varifycode" -d "{\"email\": \"$email\"}")
printf '%s\n' "$reply"
case $reply in
'{"error": 0,'* | '{"error":0,'*) ;;
*) exit 1 ;;
esac
