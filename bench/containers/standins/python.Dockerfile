# Stands in for python:3.13-slim-trixie: the same Debian, with its Python.
FROM verifyserver-standin-base
COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
RUN printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' >/etc/pip.conf \
    && apt-get update -q \
    && apt-get install -q -y --no-install-recommends python3 python3-venv python3-pip \
    && rm -f /usr/lib/python3*/EXTERNALLY-MANAGED \
    && python3 -m pip install -q --root-user-action ignore --ignore-installed pip \
    && apt-get purge -q -y python3-pip \
    && ln -s /usr/bin/python3 /usr/local/bin/python \
    && rm -rf /var/lib/apt/lists/*
