# Stands in for Prometheus and Grafana: only their health checks answer.
ARG PYTHON
FROM ${PYTHON}
RUN apt-get update -q && apt-get install -q -y --no-install-recommends wget
RUN for each in "/bin/prometheus 9090" "/run.sh 3000"; do \
        set -- $each && printf '#!/bin/sh\ncd /tmp && mkdir -p -- -/ api && : >-/ready >api/health\nexec python -m http.server %s\n' "$2" >"$1" && chmod 755 "$1"; \
    done
