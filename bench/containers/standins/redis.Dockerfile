# Stands in for redis:…-alpine.
FROM verifyserver-standin-base
RUN apt-get update -q \
    && apt-get install -q -y --no-install-recommends redis-server \
    && mkdir /data && chown redis:redis /data
VOLUME /data
