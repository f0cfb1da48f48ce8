"""The demo page: a signup form, the progress of its request, and the inbox of a mail catcher. On with VERIFY_DEMO=1."""

from producer.api.demo.routes import DATA, add

__all__ = ["DATA", "add"]
