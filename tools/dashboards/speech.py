"""How late words are, and why."""

from __future__ import annotations

from tools.dashboards.panels import Board, Panel, Query, Row, mean, quantiles, selector

LABELS = selector("ancat")

BOARD = Board(
    "speech",
    "Realtide / Speech",
    "What a listener notices, and the parts it is made of: waiting that was chosen, queues, computing.",
    (
        Row(
            "What a listener notices",
            (
                Panel(
                    "First text",
                    "s",
                    "Per utterance: from the arrival of its first word's first sample to its first text.",
                    quantiles("realtide_first_partial_seconds", LABELS),
                ),
                Panel(
                    "Words",
                    "s",
                    "Per word: from the arrival of its last sample to its first appearance.",
                    quantiles("realtide_word_delay_seconds", LABELS),
                ),
                Panel(
                    "Finals",
                    "s",
                    "From the arrival of the last word's last sample to the final. The silence that ends an utterance is "
                    "part of it (final_silence_ms, 0.8 s unless the client says otherwise). The objective is what the alert "
                    "compares the 95th percentile with.",
                    (
                        *quantiles("realtide_final_delay_seconds", LABELS),
                        Query('min(realtide:objective:final_delay_seconds{engine="ancat"})', "objective"),
                    ),
                ),
            ),
        ),
        Row(
            "What it is made of",
            (
                Panel(
                    "Lookahead",
                    "s",
                    "Future audio that words of finals waited for: the part that was chosen, by the dial or the model.",
                    (
                        mean("realtide_lookahead_seconds", LABELS),
                        *quantiles("realtide_lookahead_seconds", LABELS),
                    ),
                ),
                Panel(
                    "Queue wait",
                    "s",
                    "From a session having a step's worth of audio to the start of its step, and the objective.",
                    (
                        *quantiles("realtide_queue_wait_seconds", LABELS),
                        Query('min(realtide:objective:queue_wait_seconds{engine="ancat"})', "objective"),
                    ),
                ),
                Panel(
                    "Computing",
                    "s",
                    "Time of a step's stages: features, encoder, decoder.",
                    quantiles("realtide_step_seconds", LABELS, by="stage", which=(0.5, 0.99)),
                ),
            ),
        ),
        Row(
            "Load",
            (
                Panel(
                    "Audio",
                    "suffix: × real time",
                    "Seconds of audio received per second: the number of people who speak, if they send as they speak.",
                    (
                        Query(
                            f"sum by (model) (rate(realtide_audio_seconds_total{{{LABELS}}}[$__rate_interval]))",
                            "{{model}}",
                        ),
                    ),
                ),
                Panel(
                    "Real-time factor",
                    "percentunit",
                    "Per session: the executor's time per second of audio. Its inverse is about how many sessions one "
                    "executor holds.",
                    (
                        mean("realtide_real_time_factor", LABELS),
                        *quantiles("realtide_real_time_factor", LABELS, which=(0.95,)),
                    ),
                ),
                Panel(
                    "Sessions and slots",
                    "short",
                    "Sessions by state, and the slots there are.",
                    (
                        Query(
                            f"sum by (model, state) (realtide_sessions{{{LABELS}}})", "{{model}} {{state}}"
                        ),
                        Query(f"sum by (model) (realtide_session_capacity{{{LABELS}}})", "{{model}} slots"),
                    ),
                ),
            ),
        ),
    ),
    engine="ancat",
)
