"""Everything that knows Celery's internals."""
