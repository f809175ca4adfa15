"""What the application has been given already, so that a resumed session repeats nothing.

A session resumed from a checkpoint produces again whatever followed the checkpoint. Finals are numbered;
events and partials are known by their place in the audio.
"""

from __future__ import annotations

from realtide_client.types import Endpoint, Final, Partial, Result


class Progress:
    """Decides whether a result is new."""

    def __init__(self) -> None:
        self._last_final = -1
        self._partial = (-1.0, "", False)
        self._endpoints: set[tuple[int, str, float]] = set()

    def is_new(self, result: Result) -> bool:
        """True if the result goes beyond what was seen; it counts as seen from then on."""
        match result:
            case Final():
                if result.utterance <= self._last_final:
                    return False
                self._last_final = result.utterance
                self._endpoints = {seen for seen in self._endpoints if seen[0] >= result.utterance}
                return True
            case Partial():
                seen = (result.audio_processed, result.text, result.end_likely)
                if (
                    result.utterance <= self._last_final
                    or seen[0] < self._partial[0]
                    or seen == self._partial
                ):
                    return False
                self._partial = seen
                return True
            case Endpoint():
                key = (result.utterance, result.kind, round(result.at, 6))
                # The end of an utterance may be announced just after its final.
                if result.utterance < self._last_final or key in self._endpoints:
                    return False
                self._endpoints.add(key)
                return True
