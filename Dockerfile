# One image for all that runs in production: worker, API and Flower differ only in their command.
# The base image's tag is a Python minor version, so that a rebuild brings security fixes; packages are pinned by hash.

FROM python:3.13-slim-trixie AS build
WORKDIR /opt/verifyserver
COPY requirements.prod.lock ./
# Wheels only, so that no compiler is needed. The environment gets no pip.
RUN python -m venv --without-pip venv \
    && python -m pip --python venv/bin/python install --no-cache-dir --disable-pip-version-check --quiet --no-compile \
        --require-hashes --only-binary :all: --requirement requirements.prod.lock \
    && PYTHONHASHSEED=0 python -m compileall -q --invalidation-mode unchecked-hash venv/lib
COPY celeryconfig.py flowerconfig.py LICENSE ./
COPY producer producer
COPY worker worker
COPY deploy/health.py deploy/health.py
# Compiled here, as the container cannot write later. The same commit gives the same files: no time stamps in them, no
# order that a random seed decides, no times of this build.
RUN PYTHONHASHSEED=0 python -m compileall -q --invalidation-mode unchecked-hash \
        celeryconfig.py flowerconfig.py producer worker \
    && find . -exec touch --no-dereference --date @0 {} +

FROM python:3.13-slim-trixie
# tini forwards signals and reaps children; pip is no longer needed. Logs, caches and times of this build do not stay, nor
# does the date that useradd would write.
RUN touch /dev/shm/start \
    && apt-get update -q \
    && apt-get install -q -y --no-install-recommends tini \
    && PYTHONDONTWRITEBYTECODE=1 python -m pip uninstall -q -y --root-user-action ignore pip \
    && echo verify:x:10001:10001::/nonexistent:/usr/sbin/nologin >>/etc/passwd \
    && echo verify:x:10001: >>/etc/group \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/* /var/cache/ldconfig/* /var/lib/dpkg/*-old \
    && find /var/log -type f -delete \
    && mkdir /opt/verifyserver \
    && find / -xdev -newer /dev/shm/start -exec touch --no-dereference --date @0 {} +
COPY --from=build /opt/verifyserver /opt/verifyserver
WORKDIR /opt/verifyserver
# Nobody outside reaches a container's loopback. The API still demands keys, or VERIFY_ALLOW_PLAINTEXT=1, before it
# listens there.
ENV PATH=/opt/verifyserver/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    VERIFY_HTTP_BIND=0.0.0.0:8081 \
    VERIFY_GRPC_BIND=0.0.0.0:50051 \
    VERIFY_METRICS_BIND=0.0.0.0:9464
# As numbers, so that Kubernetes can see that it is not root.
USER 10001:10001
EXPOSE 8081 50051 9464 5555
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "producer", "serve"]
# For the command above. With another command goes another check, as in docker-compose.yml.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-ISB", "deploy/health.py", "8081", "/healthz"]
