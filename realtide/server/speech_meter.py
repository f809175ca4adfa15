"""How late words come: the speech metrics of one session (docs/metrics.md defines each)."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import Histogram

from realtide.engines.ancat.types import EndpointEvent, Final, Partial, Word
from realtide.server.arrivals import Arrivals
from realtide.server.metrics import Metrics, ModelMetrics


class SpeechMeter:
    """Compares when sounds arrived with when their words go out. `rate` is in samples per second."""

    def __init__(self, metrics: Metrics, model: ModelMetrics, rate: int, start: int) -> None:
        self._all = metrics
        self._model = model
        self._rate = rate
        self._arrivals = Arrivals(start)
        self._start = start
        self._end = start
        self._spoke = False  # the current utterance has shown text
        self._speech_start: float | None = None  # seconds of audio, from the engine's event
        self._shown: list[str] = []

    def audio(self, end: int, when: float) -> None:
        """Samples up to position `end` have arrived."""
        self._model.audio((end - self._end) / self._rate)
        self._end = end
        self._arrivals.add(end, when)

    def arrival(self, position: int) -> float | None:
        """When the sample before `position` arrived."""
        return self._arrivals.of(position)

    def endpoint(self, event: EndpointEvent) -> None:
        """An endpoint event goes out."""
        if event.kind == "speech_start":
            self._speech_start = event.at

    def partial(self, event: Partial) -> None:
        """An interim result goes out."""
        self._words(event.text, event.words)

    def final(self, event: Final) -> None:
        """A final goes out."""
        self._words(event.text, event.words)
        if event.text:
            self._delay(self._all.final_delay, event.speech_end)
        for word in event.words:
            self._model.observe(self._all.lookahead, word.lookahead)
        self._spoke = False
        self._speech_start = None
        self._shown = []
        self._arrivals.forget(self._position(event.end))

    def close(self, busy: float) -> None:
        """The session is over; its steps took `busy` seconds."""
        seconds = (self._end - self._start) / self._rate
        if seconds > 0:
            self._model.observe(self._all.real_time_factor, busy / seconds)

    def _words(self, text: str, words: Sequence[Word]) -> None:
        if text and not self._spoke:
            self._spoke = True
            start = words[0].start if words else self._speech_start
            if start is not None:
                self._delay(self._all.first_partial, start, 1)
        texts = [word.text for word in words]
        for index, word in enumerate(words):
            if index >= len(self._shown) or self._shown[index] != word.text:
                self._delay(self._all.word_delay, word.end)
        # A word that a correction took away and brings back does not appear for the first time.
        self._shown = texts + self._shown[len(texts) :]

    def _position(self, seconds: float) -> int:
        return round(seconds * self._rate)

    def _delay(self, metric: Histogram, seconds: float, more: int = 0) -> None:
        """Observe now minus the arrival of what ends `more` samples after `seconds` of audio."""
        position = min(max(self._position(seconds) + more, 1), self._end)
        arrived = self._arrivals.of(position)
        if arrived is not None:
            self._model.observe(metric, max(time.monotonic() - arrived, 0.0))
