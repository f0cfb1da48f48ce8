"""Flower's settings, read when it is started in this directory; its command line and these FLOWER_* win over them."""

import os

# As all our doors. Whoever may open Flower sees how much is going on, though never a code or a whole address.
address = os.environ.get("FLOWER_ADDRESS", "127.0.0.1")
tasks_columns = os.environ.get("FLOWER_TASKS_COLUMNS", "uuid,state,kwargs,result,received,runtime,worker")
