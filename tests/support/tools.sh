#!/bin/sh
# Programs that tests marked `tools` use and pip does not install: installed with apt-get where that is possible, else
# named. Whether they are needed is the tests' to say.
set -u

missing=
command -v chromium >/dev/null || missing="$missing chromium"
command -v spamassassin >/dev/null || missing="$missing spamassassin"
command -v redis-cli >/dev/null || missing="$missing redis-tools"
command -v tini >/dev/null || missing="$missing tini"
command -v nginx >/dev/null || [ -x /usr/sbin/nginx ] || missing="$missing nginx-light"
command -v curl >/dev/null || missing="$missing curl"
command -v node >/dev/null || missing="$missing nodejs"
command -v npm >/dev/null || missing="$missing npm"
command -v java >/dev/null || missing="$missing default-jdk-headless"
command -v go >/dev/null || missing="$missing golang-go"
command -v php >/dev/null || missing="$missing php-cli"
command -v g++ >/dev/null || missing="$missing g++"
command -v cc >/dev/null || missing="$missing gcc libc6-dev"
command -v promtool >/dev/null || missing="$missing prometheus"
command -v grpc_cpp_plugin >/dev/null || missing="$missing protobuf-compiler-grpc"
pkg-config --exists hiredis jsoncpp grpc++ protobuf 2>/dev/null ||
    missing="$missing pkg-config libhiredis-dev libjsoncpp-dev libgrpc++-dev libprotobuf-dev"
[ -e /usr/include/boost/beast.hpp ] || missing="$missing libboost-dev"
[ -n "$(fc-list :lang=zh-cn 2>/dev/null)" ] || missing="$missing fontconfig fonts-noto-cjk"
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Installing$missing ..."
    # shellcheck disable=SC2086 - words are wanted
    if apt-get update -q >/dev/null &&
        DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing >/dev/null; then
        exit 0
    fi
fi
echo "Cannot install$missing here; install them to see the tests that use them pass." >&2
