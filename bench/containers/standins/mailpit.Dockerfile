# Stands in for Mailpit, which Debian does not have: the demo's catcher at the same ports.
ARG PYTHON
FROM ${PYTHON}
RUN python -m pip install -q --root-user-action ignore aiosmtpd
COPY demo /opt/demo
COPY mailpit.py /mailpit
RUN chmod 755 /mailpit
ENV PYTHONPATH=/opt
CMD ["/mailpit"]
