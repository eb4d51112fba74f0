"""Every metric that /metrics tells from the start, and of which kind it is."""

FAMILIES = {
    "freeway_requests": "counter", "freeway_attempts": "counter", "freeway_failovers": "counter",
    "all_models_exhausted": "counter", "freeway_transient_cooldowns": "gauge", "freeway_key_cooldowns": "gauge",
    "freeway_bans": "gauge", "freeway_sessions": "gauge", "freeway_active_attempts": "gauge",
    "freeway_running_requests": "gauge", "freeway_tokens": "counter", "freeway_attempt_duration_seconds": "histogram",
    "freeway_first_token_seconds": "histogram", "freeway_routable_models": "gauge", "freeway_log_queue_rows": "gauge",
    "freeway_log_dropped_rows": "counter", "freeway_log_dropped_lines": "counter",
    "freeway_malformed_events": "counter", "freeway_tasks": "gauge",
    "freeway_gates_open": "gauge", "freeway_trials": "counter", "freeway_waiting": "gauge", "freeway_waits": "counter",
    "freeway_rescues": "counter", "freeway_hedges": "counter", "freeway_cache": "counter",
    "freeway_cache_bytes": "gauge",
}  # fmt: skip
