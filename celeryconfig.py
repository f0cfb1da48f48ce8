"""Celery's settings, for worker and Flower. Each is here for a reason, which stands beside it."""

from producer.contract import REPLY_TTL, TASK
from producer.settings import load_or_exit
from worker.celery_side.redis_urls import broker_form, results_form

_settings = load_or_exit()
_broker, _results = broker_form(_settings.broker_url), results_form(_settings.results_url)  # plain, or by sentinels
# A silent or half-open Redis is noticed in seconds. redis-py 8 would try a command ten times by itself; one who waits
# for an answer is better served by an early error.
_sockets = {
    "socket_timeout": 5,
    "socket_connect_timeout": 2,
    "socket_keepalive": True,
    "health_check_interval": 5,
    "retry_on_timeout": False,
}

broker_url = _broker.url
broker_use_ssl = _broker.tls or False  # said here where sentinels name the server; a plain URL says it itself
broker_transport_options = {"visibility_timeout": _settings.visibility_timeout, **_sockets, **_broker.options}
broker_connection_retry_on_startup = True  # worker and Redis start in any order
broker_connection_max_retries = None  # Redis may stay away for long
broker_pool_limit = 100  # at most, opened when needed: each of Flower's threads (up to 32) holds two while it inspects

# Stores success, nothing else.
result_backend = (
    f"worker.celery_side.backend:{'SentinelReplyBackend' if _results.sentinel else 'ReplyBackend'}+{_results.url}"
)
redis_username, redis_password = _results.user, _results.password  # as broker_use_ssl
redis_backend_use_ssl = _results.tls
result_expires = REPLY_TTL  # as long as a request id is remembered
redis_socket_timeout = _sockets["socket_timeout"]  # the backend has its own names for these
redis_socket_connect_timeout = _sockets["socket_connect_timeout"]
redis_socket_keepalive = True
redis_backend_health_check_interval = _sockets["health_check_interval"]
redis_retry_on_timeout = False
result_backend_transport_options = {"visibility_timeout": _settings.visibility_timeout, **_results.options}
visibility_timeout = _settings.visibility_timeout  # the shortest of all apps on a broker wins: say it everywhere

task_default_queue = _settings.queue  # the one queue a worker consumes
task_routes = {TASK: {"queue": _settings.queue}}
task_create_missing_queues = True  # a chain or callback may go on in a queue that only its caller knows
task_serializer = "json"  # readable from any language
result_serializer = "json"
accept_content = ["json"]  # never pickle
task_protocol = 2  # the contract's
task_ignore_result = False  # the result is the reply
task_track_started = False  # SUCCESS is the only state ever stored
task_acks_late = True  # a message is done when its request is
task_store_errors_even_if_ignored = False  # no FAILURE under a request's id

worker_pool = "threads"  # sends run on one asyncio loop; threads only wait for what came through Celery's own machinery
worker_concurrency = 8  # ... which is rare: ETA, chains, groups
worker_prefetch_multiplier = 1  # the intake reserves by free relay connections; Celery is given single messages
worker_eta_task_limit = 10_000  # requests with an ETA that one worker holds in memory
worker_send_task_events = True  # Flower sees every request without further ado
worker_enable_remote_control = True  # inspect, ping, shutdown
worker_consumer = "worker.celery_side.consumer:Consumer"  # opens the service; no gossip, no mingle
worker_hijack_root_logger = False  # producer.logs has it, and masks addresses
worker_redirect_stdouts = False  # nothing here prints
worker_cancel_long_running_tasks_on_connection_loss = False  # a send that is under way may still be accepted
worker_enable_prefetch_count_reduction = False  # the intake decides what to reserve
enable_utc = True
event_queue_ttl = 5.0  # an event nobody reads is worth nothing
control_queue_ttl = 60.0  # seconds an answer to `inspect` waits
