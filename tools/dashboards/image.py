"""How long images take, what conditions cost, and what the cache of conditions saves."""

from __future__ import annotations

from tools.dashboards.panels import Board, Panel, Query, Row, quantiles, selector

LABELS = selector("easycontrol")


def _rate(metric: str) -> str:
    return f"sum by (model) (rate({metric}{{{LABELS}}}[$__rate_interval]))"


HITS, MISSES = _rate("realtide_condition_cache_hits_total"), _rate("realtide_condition_cache_misses_total")

BOARD = Board(
    "image",
    "Realtide / Images",
    "What somebody who waits for an image notices, and what the steps and conditions cost.",
    (
        Row(
            "What people notice",
            (
                Panel(
                    "First preview",
                    "s",
                    "Per image with previews: from the arrival of its control to its first preview, the wait for images before it included.",
                    quantiles("realtide_first_preview_seconds", LABELS),
                ),
                Panel(
                    "Image",
                    "s",
                    "From the arrival of its control to the image, written.",
                    quantiles("realtide_image_seconds", LABELS),
                ),
                Panel(
                    "Images",
                    "cps",
                    "Images a second, written to clients.",
                    (Query(_rate("realtide_images_total"), "{{model}}"),),
                ),
            ),
        ),
        Row(
            "Conditions",
            (
                Panel(
                    "Conditions found and computed",
                    "cps",
                    "Conditions a second whose keys and values were in the cache, and that had to be computed.",
                    (Query(HITS, "{{model}} found"), Query(MISSES, "{{model}} computed")),
                ),
                Panel(
                    "Found in the cache",
                    "percentunit",
                    "Part of the conditions that were in the cache. Low though clients use conditions again: the budget is too small.",
                    (Query(f"{HITS} / ({HITS} + {MISSES})", "{{model}}"),),
                    top=1,
                ),
                Panel(
                    "Budget of the cache",
                    "bytes",
                    "What the keys and values of conditions may take.",
                    (
                        Query(
                            f"sum by (instance, model) (realtide_kv_cache_bytes{{{LABELS}}})",
                            "{{instance}} {{model}}",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "What it is made of",
            (
                Panel(
                    "Computing",
                    "s",
                    "Time of a step's stages: text, condition, denoise, preview, VAE.",
                    quantiles("realtide_step_seconds", LABELS, by="stage", which=(0.5, 0.99)),
                ),
                Panel(
                    "Queue wait",
                    "s",
                    "From a session being able to go on to the start of its step, and the objective. Sessions share steps and take turns.",
                    (
                        *quantiles("realtide_queue_wait_seconds", LABELS),
                        Query(
                            'min(realtide:objective:queue_wait_seconds{engine="easycontrol"})', "objective"
                        ),
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
    engine="easycontrol",
)
