"""Celery's settings for the worker and Flower, each with its reason."""

from producer.contract import REPLY_TTL, TASK
from producer.setting_types import is_sentinel
from producer.settings import load_or_exit
from worker.celery_side.redis_urls import celery_form

# The one place where a worker or Flower reads its settings: a later edit of .env counts from the next start.
# `inspect conf`, and so Flower, shows every name here but those with an underscore.
_settings = load_or_exit()
_broker, _results = celery_form(_settings.broker_url, login=True), celery_form(_settings.results_url, login=False)
# Notice a silent or half-open Redis within seconds. redis-py 8 would retry a command ten times on its own, while the
# caller waits: an early error serves it better.
_sockets = {
    "socket_timeout": 5,
    "socket_connect_timeout": 2,
    "socket_keepalive": True,
    "health_check_interval": 5,
    "retry_on_timeout": False,
}

broker_url = _broker.url
broker_use_ssl = _broker.tls or False  # only needed with Sentinel; a plain URL says rediss://
broker_transport_options = {
    "visibility_timeout": _settings.visibility_timeout,
    **_sockets,
    **_broker.options,
}
broker_connection_retry_on_startup = True  # worker and Redis start in any order
broker_connection_max_retries = None  # Redis may stay away for long
# An upper bound, opened on demand: each of Flower's threads (up to 32) holds two while it inspects.
broker_pool_limit = 100
_backend = "SentinelReplyBackend" if is_sentinel(_settings.results_url) else "ReplyBackend"
result_backend = f"worker.celery_side.backend:{_backend}+{_results.url}"
redis_username = _results.user  # only set with Sentinel, as are the next two
redis_password = _results.password
redis_backend_use_ssl = _results.tls
result_expires = REPLY_TTL  # as long as a request id is remembered
redis_socket_timeout = _sockets["socket_timeout"]  # the backend has its own names for _sockets
redis_socket_connect_timeout = _sockets["socket_connect_timeout"]
redis_socket_keepalive = True
redis_backend_health_check_interval = _sockets["health_check_interval"]
result_backend_transport_options = {"visibility_timeout": _settings.visibility_timeout, **_results.options}
visibility_timeout = _settings.visibility_timeout  # the shortest of all apps on a broker wins
task_default_queue = _settings.queue  # the one queue that a worker consumes
task_routes = {TASK: {"queue": _settings.queue}}
accept_content = ["json"]  # never pickle
task_protocol = 2  # the contract's
task_track_started = False  # SUCCESS is the only state ever stored
task_acks_late = True  # a message is done when its request is
worker_pool = "threads"  # sends run on one asyncio loop; threads only wait for what needs Celery's machinery
worker_concurrency = 8  # ... which is rare: chains, groups
worker_prefetch_multiplier = 1  # the fetcher reserves by free relay connections; Celery gets single messages
worker_send_task_events = True  # Flower sees every request without `-E`
worker_consumer = "worker.celery_side.consumer:Consumer"  # starts the service; no gossip, no mingle
worker_hijack_root_logger = False  # producer.logs configures it, and masks addresses
worker_redirect_stdouts = False  # nothing here prints
worker_cancel_long_running_tasks_on_connection_loss = False  # the relay may still accept a mail under way
worker_enable_prefetch_count_reduction = False  # the fetcher decides what to reserve
# In memory, where the default would write `celerybeat-schedule` into the working directory: with `-B`, nothing
# is scheduled here that a restart could lose.
beat_scheduler = "celery.beat:Scheduler"
control_queue_ttl = 60.0  # seconds that an answer to `inspect` waits
