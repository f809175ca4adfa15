"""How soon an image shows and is done, and what the cache of conditions spares."""

from __future__ import annotations

from tools.dashboards.panels import Board, Panel, Query, Row, quantiles, selector

LABELS = selector("easycontrol")


def _rate(metric: str, legend: str) -> Query:
    return Query(f"sum by (model) (rate({metric}{{{LABELS}}}[$__rate_interval]))", f"{{{{model}}}} {legend}")


BOARD = Board(
    "images",
    "Realtide / Images",
    "How soon an image shows and is done, and what the cache of conditions spares.",
    (
        Row(
            "What a user notices",
            (
                Panel(
                    "First preview",
                    "s",
                    "From the request of an image with previews to its first one; waiting for images before it counts.",
                    quantiles("realtide_first_preview_seconds", LABELS),
                ),
                Panel(
                    "Image",
                    "s",
                    "From the request of an image to the image, written.",
                    quantiles("realtide_image_seconds", LABELS),
                ),
                Panel(
                    "Images",
                    "cps",
                    "Images written a second, all sessions together.",
                    (_rate("realtide_images_total", "images"),),
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
                    "Conditions",
                    "cps",
                    "Conditions of images that were in the cache, and that were computed.",
                    (
                        _rate("realtide_condition_cache_hits_total", "hits"),
                        _rate("realtide_condition_cache_misses_total", "misses"),
                    ),
                ),
                Panel(
                    "Queue wait",
                    "s",
                    "From a session being able to go on to the start of its step. Sessions take turns.",
                    quantiles("realtide_queue_wait_seconds", LABELS),
                ),
                Panel(
                    "Sessions and slots",
                    "short",
                    "Parked: the client does not read.",
                    (
                        Query(
                            f"sum by (model, state) (realtide_sessions{{{LABELS}}})", "{{model}} {{state}}"
                        ),
                        Query(f"sum by (model) (realtide_session_capacity{{{LABELS}}})", "{{model}} slots"),
                    ),
                ),
                Panel(
                    "Sessions a step",
                    "short",
                    "Images of one size under equally many conditions share a step.",
                    quantiles("realtide_step_batch_size", LABELS, which=(0.5, 0.99)),
                ),
                Panel(
                    "Cache of conditions",
                    "bytes",
                    "Its budget.",
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
    engine="easycontrol",
)
