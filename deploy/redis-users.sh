#!/bin/sh
# Writes redis-users.acl with random passwords, and these beside it, into a new folder:
#     sh deploy/redis-users.sh FOLDER
# Redis refuses the file as it is shipped, so nobody runs it with a password that others know.
set -eu

umask 077
mkdir "$1"
cp "$(dirname "$0")/redis-users.acl" "$1/redis-users.acl"
while read -r _ name _ placeholder _; do
    LC_ALL=C tr -dc A-Za-z0-9 </dev/urandom | head -c 32 >"$1/$name.password"
    hash=$(sha256sum "$1/$name.password")
    sed -i "s/$placeholder /#${hash%% *} /" "$1/redis-users.acl"
done <"$(dirname "$0")/redis-users.acl"
