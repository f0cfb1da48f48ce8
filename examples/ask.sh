#!/bin/sh
# Asks for a code at the HTTP door, with curl, and prints the reply.
#
#   sh ask.sh a@example.com
set -eu

door=${VERIFY_HTTP_DOOR:-http://127.0.0.1:8081}
email=$(printf %s "$1" | sed 's/[\\"]/\\&/g') # as JSON has it
# The door answers within VERIFY_REPLY_TIMEOUT, 5 s unless set; 10 s are for a door that is not there.
reply=$(curl -sS -m 10 "$door/get_varifycode" -d "{\"email\": \"$email\"}")
printf '%s\n' "$reply"
case $reply in
'{"error": 0,'* | '{"error":0,'*) ;;
*) exit 1 ;;
esac
