"""The demo page: a signup form, the way of its request, and the inbox of a mail catcher. Served with VERIFY_DEMO=1."""

from producer.api.demo.routes import add

__all__ = ["add"]
