"""Long runs under random faults, and comparisons with stock Celery."""
