"""Flower's settings, read from the directory in which it starts; its command line and these FLOWER_* variables win."""

import os

# Loopback, like our API. Whoever opens Flower sees how much traffic there is, but no code and no whole address.
address = os.environ.get("FLOWER_ADDRESS", "127.0.0.1")
# What fits at a width of 1280 pixels. `result` is the reply; it holds the masked address, so `kwargs` is left out.
tasks_columns = os.environ.get("FLOWER_TASKS_COLUMNS", "state,result,received,runtime,worker,uuid")
# At 8 kB a task, 30,000 bound Flower's memory to 330 MB, or 420 MB once somebody has read them all at /api/tasks. That
# is half a minute of 1,000 requests a second.
max_tasks = int(os.environ.get("FLOWER_MAX_TASKS", "30000"))
purge_offline_workers = int(os.environ.get("FLOWER_PURGE_OFFLINE_WORKERS", "3600"))  # seconds
