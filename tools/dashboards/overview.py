"""Are streams well, on every server and for every model? What is common to all engines."""

from __future__ import annotations

from tools.dashboards.panels import Board, Panel, Query, Row, mean, quantiles, selector

ALL = selector()
HELD = selector(more='state=~"active|parked"')
QUEUED = selector(more='state="queued"')
FAILED = selector(more='outcome="server_error"')
SERVER = 'job=~"$job", instance=~"$instance"'


def _rate(metric: str, by: str, more: str = "", labels: str = ALL) -> str:
    chosen = f"{labels}, {more}" if more else labels
    return f"sum by ({by}) (rate({metric}{{{chosen}}}[$__rate_interval]))"


AT_A_GLANCE = Row(
    "At a glance",
    (
        Panel(
            "Servers",
            "short",
            "Servers that Prometheus reaches.",
            (Query(f"count(realtide_build_info{{{SERVER}}})", "servers"),),
            kind="number",
            width=3,
        ),
        Panel(
            "Alerts",
            "short",
            "Alerts of Realtide that fire now, of all servers. docs/operations.md has a paragraph for each.",
            (Query('count(ALERTS{alertname=~"Realtide.*", alertstate="firing"}) or vector(0)', "firing"),),
            kind="number",
            width=3,
            red=1,
        ),
        Panel(
            "Sessions",
            "short",
            "Sessions that hold a slot.",
            (Query(f"sum(realtide_sessions{{{HELD}}})", "sessions"),),
            kind="number",
            width=3,
        ),
        Panel(
            "Slots in use",
            "percentunit",
            "Part of all slots that is taken. New sessions wait at 100 %.",
            (
                Query(
                    f"sum(realtide_sessions{{{HELD}}}) / sum(realtide_session_capacity{{{ALL}}})",
                    "in use",
                ),
            ),
            kind="number",
            width=3,
            red=0.95,
        ),
        Panel(
            "Waiting for a slot",
            "short",
            "Sessions in the queue. Well: 0.",
            (Query(f"sum(realtide_sessions{{{QUEUED}}})", "queued"),),
            kind="number",
            width=3,
            red=1,
        ),
        Panel(
            "Slots leaked",
            "short",
            "Slots that no session holds. Anything but 0 is a bug.",
            (Query(f"sum(realtide_slots_leaked{{{ALL}}})", "leaked"),),
            kind="number",
            width=3,
            red=1,
        ),
        Panel(
            "Sessions failed",
            "percentunit",
            "Part of the sessions of the last five minutes that ended with an error of the server.",
            (
                Query(
                    f"sum(increase(realtide_sessions_closed_total{{{FAILED}}}[5m]))"
                    f" / clamp_min(sum(increase(realtide_sessions_closed_total{{{ALL}}}[5m])), 1)",
                    "failed",
                ),
            ),
            kind="number",
            width=3,
            red=0.01,
        ),
        Panel(
            "Deadlines missed",
            "percentunit",
            "Part of the session steps of the last five minutes that ended after their deadline.",
            (
                Query(
                    f"sum(increase(realtide_deadline_misses_total{{{ALL}}}[5m]))"
                    f" / clamp_min(sum(increase(realtide_queue_wait_seconds_count{{{ALL}}}[5m])), 1)",
                    "missed",
                ),
            ),
            kind="number",
            width=3,
            red=0.01,
        ),
    ),
)

SESSIONS = Row(
    "Sessions",
    (
        Panel(
            "Sessions and slots",
            "short",
            "Sessions by state, and the slots there are. Parked sessions hold a slot and are not advanced.",
            (
                Query(f"sum by (model, state) (realtide_sessions{{{ALL}}})", "{{model}} {{state}}"),
                Query(f"sum by (model) (realtide_session_capacity{{{ALL}}})", "{{model}} slots"),
            ),
        ),
        Panel(
            "Opened and closed",
            "cps",
            "Sessions a second that got a slot, and that gave it back, by outcome.",
            (
                Query(_rate("realtide_sessions_opened_total", "model"), "{{model}} opened"),
                Query(_rate("realtide_sessions_closed_total", "model, outcome"), "{{model}} {{outcome}}"),
            ),
        ),
        Panel(
            "Refused",
            "cps",
            "Sessions a second that got no slot, by reason. While a server drains it refuses with `draining`.",
            (Query(_rate("realtide_admission_refused_total", "model, reason"), "{{model}} {{reason}}"),),
        ),
        Panel(
            "Length of sessions",
            "s",
            "From slot taken to slot free.",
            quantiles("realtide_session_duration_seconds", ALL, which=(0.5, 0.95)),
        ),
        Panel(
            "Checkpoints",
            "bytes",
            "Size of checkpoints: what one resume costs on the wire.",
            quantiles("realtide_checkpoint_bytes", ALL, which=(0.5, 0.99)),
        ),
        Panel(
            "Resuming",
            "s",
            "From a resume message to the answer, the wait for a slot included.",
            quantiles("realtide_resume_seconds", ALL, which=(0.5, 0.95)),
        ),
    ),
)

STEPS = Row(
    "Steps",
    (
        Panel(
            "Queue wait",
            "s",
            "From a session having a step's worth of input to the start of its step. Long: the executor has too much to do.",
            quantiles("realtide_queue_wait_seconds", ALL),
        ),
        Panel(
            "Steps by stage",
            "s",
            "Mean time of each stage of a step.",
            (
                Query(
                    f"{_rate('realtide_step_seconds_sum', 'model, stage')}"
                    f" / {_rate('realtide_step_seconds_count', 'model, stage')}",
                    "{{model}} {{stage}}",
                ),
            ),
        ),
        Panel(
            "Executor busy",
            "percentunit",
            "Part of the time that executors compute; each has one thread. Near 100 % times the executors: no room.",
            (Query(_rate("realtide_step_seconds_sum", "instance, model"), "{{instance}} {{model}}"),),
        ),
        Panel(
            "Sessions in a step",
            "short",
            "Sessions that one step advances together. Under load batches fill by themselves.",
            (
                mean("realtide_step_batch_size", ALL),
                *quantiles("realtide_step_batch_size", ALL, which=(0.95,)),
            ),
        ),
        Panel(
            "Deadlines missed",
            "cps",
            "Session steps a second that ended after their deadline.",
            (Query(_rate("realtide_deadline_misses_total", "model"), "{{model}}"),),
        ),
        Panel(
            "Lag of the event loop",
            "s",
            "How late a timer of 50 ms runs: what every message waits for beside its own work.",
            quantiles("realtide_event_loop_lag_seconds", SERVER, by="instance", which=(0.5, 0.99)),
        ),
    ),
)

CALLS = Row(
    "Calls",
    (
        Panel(
            "Calls by status",
            "cps",
            "Calls a second that ended, by service and gRPC status. Internal, Unknown and DataLoss are bugs.",
            (
                Query(
                    _rate("grpc_server_handled_total", "grpc_service, grpc_code", labels=SERVER),
                    "{{grpc_service}} {{grpc_code}}",
                ),
            ),
        ),
        Panel(
            "Calls started and open",
            "short",
            "Started: calls a second. Open: started less ended.",
            (
                Query(
                    _rate("grpc_server_started_total", "grpc_service", labels=SERVER),
                    "{{grpc_service}} started/s",
                ),
                Query(
                    f"sum by (grpc_service) (grpc_server_started_total{{{SERVER}}})"
                    f" - sum by (grpc_service) (grpc_server_handled_total{{{SERVER}}})",
                    "{{grpc_service}} open",
                ),
            ),
        ),
        Panel(
            "Messages",
            "mps",
            "Messages a second from and to clients.",
            (
                Query(
                    _rate("grpc_server_msg_received_total", "grpc_service", labels=SERVER),
                    "{{grpc_service}} received",
                ),
                Query(
                    _rate("grpc_server_msg_sent_total", "grpc_service", labels=SERVER),
                    "{{grpc_service}} sent",
                ),
            ),
        ),
        Panel(
            "Length of calls",
            "s",
            "A stream is one call from its open to its end.",
            quantiles("grpc_server_handling_seconds", SERVER, by="grpc_service", which=(0.5, 0.99)),
        ),
        Panel(
            "Refused at the door",
            "cps",
            "Calls a second that were refused before they began, by reason: keys that are missing, wrong or expired, and the quotas of clients.",
            (Query(_rate("realtide_calls_refused_total", "reason", labels=SERVER), "{{reason}}"),),
        ),
        Panel(
            "Files that could not be reloaded",
            "short",
            "Changes of keys or certificates in the last 15 minutes that could not be used; what was in force stays so. Well: 0.",
            (
                Query(
                    f"sum by (instance, file) (increase(realtide_reload_failures_total{{{SERVER}}}[15m]))",
                    "{{instance}} {{file}}",
                ),
            ),
        ),
    ),
)

MACHINE = Row(
    "Memory and process",
    (
        Panel(
            "Memory",
            "bytes",
            "By kind: resident memory of the process, and with GPUs what is in use of them and what they have.",
            (Query(f"realtide_device_memory_bytes{{{SERVER}}}", "{{instance}} {{kind}}"),),
        ),
        Panel(
            "Caches",
            "bytes",
            "Preallocated state of all slots. It does not grow with sessions.",
            (Query(f"realtide_kv_cache_bytes{{{ALL}}}", "{{instance}} {{model}}"),),
        ),
        Panel(
            "Resident and virtual memory",
            "bytes",
            "Of the process, and of executors that are processes of their own. Resident memory that grows for "
            "hours under even load is a leak.",
            (
                Query(f"process_resident_memory_bytes{{{SERVER}}}", "{{instance}} resident"),
                Query(f"process_virtual_memory_bytes{{{SERVER}}}", "{{instance}} virtual"),
                Query(
                    f"realtide_executor_process_resident_bytes{{{ALL}}} > 0",
                    "{{instance}} {{model}} executors",
                ),
            ),
        ),
        Panel(
            "Processor",
            "short",
            "Cores in use by the process, and by executors that are processes of their own.",
            (
                Query(
                    f"sum by (instance) (rate(process_cpu_seconds_total{{{SERVER}}}[$__rate_interval]))",
                    "{{instance}}",
                ),
                Query(
                    "sum by (instance, model) "
                    f"(rate(realtide_executor_process_cpu_seconds_total{{{ALL}}}[$__rate_interval])) > 0",
                    "{{instance}} {{model}} executors",
                ),
            ),
        ),
        Panel(
            "File descriptors",
            "short",
            "Open ones, and how many there may be.",
            (
                Query(f"process_open_fds{{{SERVER}}}", "{{instance}} open"),
                Query(f"process_max_fds{{{SERVER}}}", "{{instance}} limit"),
            ),
        ),
        Panel(
            "Uptime",
            "s",
            "Since the process started. A line that falls is a restart.",
            (Query(f"time() - process_start_time_seconds{{{SERVER}}}", "{{instance}}"),),
        ),
        Panel(
            "Models",
            "short",
            "Servers that have a model, by its version, backend, arithmetic and device.",
            (
                Query(
                    f"count by (model, version, backend, precision, device) (realtide_model_info{{{ALL}}})",
                    "{{model}} {{version}} {{backend}} {{precision}} {{device}}",
                ),
            ),
        ),
        Panel(
            "Loading",
            "s",
            "Time that loading the model took. The startup probe has to allow for it.",
            (Query(f"realtide_model_load_seconds{{{ALL}}}", "{{instance}} {{model}}"),),
        ),
        Panel(
            "Versions",
            "short",
            "Servers by version of Realtide and Python. Two during an update.",
            (
                Query(
                    f"count by (version, python) (realtide_build_info{{{SERVER}}})",
                    "{{version}}, Python {{python}}",
                ),
            ),
        ),
    ),
)

BOARD = Board(
    "overview",
    "Realtide / Overview",
    "Sessions, slots, steps, calls and memory of all models.",
    (AT_A_GLANCE, SESSIONS, STEPS, CALLS, MACHINE),
)
