"""Whether frames come as fast as they are played, where they are lost, and how soon a prompt shows."""

from __future__ import annotations

from tools.dashboards.panels import Board, Panel, Query, Row, quantiles, selector

LABELS = selector("longlive")
DELIVERED = selector("longlive", 'stage="delivered"')


def _by_stage(expression: str) -> tuple[Query, ...]:
    return (Query(expression, "{{model}} {{stage}}"),)


BOARD = Board(
    "video",
    "Realtide / Video",
    "What a viewer notices, where frames are lost, and what prompt changes cost.",
    (
        Row(
            "What a viewer notices",
            (
                Panel(
                    "Frames delivered",
                    "suffix: frames/s",
                    "Per session that wants frames, and the objective. Below the video's own rate it stops and goes.",
                    (
                        Query(
                            f"avg by (model) (realtide_fps{{{DELIVERED}}})",
                            "{{model}}",
                        ),
                        Query('min(realtide:objective:delivered_fps{engine="longlive"})', "objective"),
                    ),
                ),
                Panel(
                    "Prompt to its first frame",
                    "s",
                    "From the arrival of a prompt that is wanted as soon as possible to the first frame that shows it, and the "
                    "objective for the 95th percentile. A pause, or missing credit, in between counts.",
                    (
                        *quantiles("realtide_prompt_switch_seconds", LABELS),
                        Query(
                            'min(realtide:objective:prompt_switch_seconds{engine="longlive"})', "objective"
                        ),
                    ),
                ),
                Panel(
                    "First frame",
                    "s",
                    "From open, or the first credit after it, to the first frame written.",
                    quantiles("realtide_first_frame_seconds", LABELS),
                ),
            ),
        ),
        Row(
            "Where frames are lost",
            (
                Panel(
                    "Frames per session by stage",
                    "suffix: frames/s",
                    "Denoised, decoded, delivered, per session that wants frames. The first that is low is the place to look.",
                    _by_stage(f"avg by (model, stage) (realtide_fps{{{LABELS}}})"),
                ),
                Panel(
                    "Frames of all sessions by stage",
                    "suffix: frames/s",
                    "The same of all sessions together.",
                    _by_stage(
                        f"sum by (model, stage) (rate(realtide_frames_total{{{LABELS}}}[$__rate_interval]))"
                    ),
                ),
                Panel(
                    "Time between frames",
                    "s",
                    "While the client waits for them. A 99th percentile above the length of a frame is a stutter.",
                    quantiles("realtide_frame_interval_seconds", LABELS),
                ),
            ),
        ),
        Row(
            "What it is made of",
            (
                Panel(
                    "Computing",
                    "s",
                    "Time of a step's stages: text, denoise, clean pass, recache, VAE, encoding.",
                    quantiles("realtide_step_seconds", LABELS, by="stage", which=(0.5, 0.99)),
                ),
                Panel(
                    "Recache",
                    "s",
                    "Making a cache follow a new prompt: the part of a switch that is computed.",
                    quantiles("realtide_recache_seconds", LABELS),
                ),
                Panel(
                    "Queue wait",
                    "s",
                    "From a session being able to go on to the start of its step, and the objective. Sessions take turns.",
                    (
                        *quantiles("realtide_queue_wait_seconds", LABELS),
                        Query('min(realtide:objective:queue_wait_seconds{engine="longlive"})', "objective"),
                    ),
                ),
                Panel(
                    "Sessions and slots",
                    "short",
                    "Parked: the client does not read, or the session's cache was put aside.",
                    (
                        Query(
                            f"sum by (model, state) (realtide_sessions{{{LABELS}}})", "{{model}} {{state}}"
                        ),
                        Query(f"sum by (model) (realtide_session_capacity{{{LABELS}}})", "{{model}} slots"),
                    ),
                ),
                Panel(
                    "Deadlines missed",
                    "cps",
                    "Steps a second that ended after the first frame of their block was to be played.",
                    (
                        Query(
                            f"sum by (model) (rate(realtide_deadline_misses_total{{{LABELS}}}[$__rate_interval]))",
                            "{{model}}",
                        ),
                    ),
                ),
                Panel(
                    "Caches",
                    "bytes",
                    "Preallocated state of all slots.",
                    (
                        Query(
                            f"sum by (instance, model) (realtide_kv_cache_bytes{{{LABELS}}})",
                            "{{instance}} {{model}}",
                        ),
                    ),
                ),
            ),
        ),
    ),
    engine="longlive",
)
