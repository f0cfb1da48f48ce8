#!/bin/sh
# Prints a Secret with random passwords and keys for this overlay:
#     sh deploy/kubernetes/overlays/try/secret.sh | kubectl create -n verifyserver -f -
# `create`, not `apply`: Redis keeps the password of the first one.
set -eu

random() { LC_ALL=C tr -dc A-Za-z0-9 </dev/urandom | head -c 32; }
redis=$(random) metrics=$(random)

cat <<END
apiVersion: v1
kind: Secret
metadata:
  name: verifyserver
  labels: { app.kubernetes.io/name: verifyserver }
stringData:
  redis-url: redis://:$redis@redis:6379
  redis-address: redis.verifyserver:6379
  redis-password: $redis
  relays: smtp://mailpit:1025
  api-keys: app:$(random),metrics:$metrics
  metrics-key: $metrics
  flower: admin:$(random)
END
