"""Everything that knows Celery's insides."""
