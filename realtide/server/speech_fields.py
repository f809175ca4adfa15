"""Checks every field of a speech session's messages and translates them to the engine's options and controls.

Each refusal names the field's path and the accepted range, and comes before a slot is taken (open) or before
the engine has seen anything of the message (controls).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from realtide.engines.ancat import types
from realtide.server.audio import BYTES
from realtide.server.config import ServerConfig
from realtide.server.models import SpeechInfo
from realtide.server.status import invalid
from realtide_client.v1 import speech_pb2 as pb

# proto: EndpointingRules and SpeechOptions
_LEAST_SILENCE_MS = 40
_LEAST_UTTERANCE_MS = 1000
_MOST_CAP_MS = 2**31 - 1
_Threshold = Literal["likely_silence_ms", "final_silence_ms", "no_speech_ms", "max_utterance_ms"]


@dataclass(frozen=True, slots=True)
class Fields:
    """Checks against one model's and one server's limits."""

    info: SpeechInfo
    config: ServerConfig

    def limits(self) -> pb.SpeechLimits:
        """The ranges as the client is told."""
        low_rate, high_rate = self.info.sample_rate_range
        low_bias, high_bias = self.info.lookahead_bias_range
        return pb.SpeechLimits(
            min_sample_rate_hz=low_rate,
            max_sample_rate_hz=high_rate,
            max_audio_ahead_seconds=self.config.max_audio_ahead,
            max_beam=self.info.max_beam,
            min_lookahead_bias=low_bias,
            max_lookahead_bias=high_bias,
            max_phrases=self.config.max_phrases,
            max_phrase_characters=self.config.max_phrase_characters,
            max_boost=self.info.max_boost,
            max_utterance_ms=self.info.max_utterance_ms,
        )

    def audio(self, form: pb.AudioFormat, path: str) -> None:
        """Check the form of the audio."""
        if form.encoding not in BYTES:
            raise invalid(f"{path}.encoding", f"{form.encoding}, must be 1 (LINEAR16) or 2 (FLOAT32)")
        low, high = self.info.sample_rate_range
        _within(f"{path}.sample_rate_hz", form.sample_rate_hz, low, high, "samples per second")

    def options(self, given: pb.SpeechOptions, path: str) -> pb.SpeechOptions:
        """Check the options and fill in every default."""
        full = pb.SpeechOptions()
        full.CopyFrom(given)
        for name in ("interim_results", "word_times"):
            if not given.HasField(name):
                setattr(full, name, True)
        full.beam = given.beam if given.HasField("beam") else 1
        _within(f"{path}.beam", full.beam, 1, self.info.max_beam)
        full.max_alternatives = given.max_alternatives if given.HasField("max_alternatives") else 1
        _within(f"{path}.max_alternatives", full.max_alternatives, 1, full.beam)
        full.lookahead_bias = self.bias(given.lookahead_bias, f"{path}.lookahead_bias")
        if given.HasField("max_lookahead_ms"):
            _within(f"{path}.max_lookahead_ms", given.max_lookahead_ms, 0, _MOST_CAP_MS, "ms")
        full.endpointing.CopyFrom(self.endpointing(given.endpointing, f"{path}.endpointing"))
        del full.boosts[:]
        full.boosts.extend(self.boosts(given.boosts, f"{path}.boosts"))
        languages = self.info.language_codes
        full.language_code = given.language_code or next(iter(languages), "")
        if given.language_code and given.language_code.lower() not in (tag.lower() for tag in languages):
            raise invalid(
                f"{path}.language_code", f"{given.language_code!r}, must be one of {', '.join(languages)}"
            )
        return full

    def bias(self, value: float, path: str) -> float:
        """Check a lookahead bias."""
        low, high = self.info.lookahead_bias_range
        _within(path, value, low, high)
        return value

    def endpointing(self, given: pb.EndpointingRules, path: str) -> pb.EndpointingRules:
        """Check endpointing rules and fill in every default."""
        defaults = types.EndpointRules()
        most = self.info.max_utterance_ms
        full = pb.EndpointingRules(enabled=given.enabled if given.HasField("enabled") else defaults.enabled)
        thresholds: tuple[tuple[_Threshold, int], ...] = (
            ("likely_silence_ms", 0),
            ("final_silence_ms", _LEAST_SILENCE_MS),
            ("no_speech_ms", _LEAST_SILENCE_MS),
            ("max_utterance_ms", _LEAST_UTTERANCE_MS),
        )
        for name, least in thresholds:
            # A default may be more than a model with short utterances takes.
            value = getattr(given, name) if given.HasField(name) else min(getattr(defaults, name), most)
            _within(f"{path}.{name}", value, least, most, "ms")
            setattr(full, name, value)
        if not given.HasField("likely_silence_ms"):
            full.likely_silence_ms = min(full.likely_silence_ms, full.final_silence_ms)
        if full.likely_silence_ms > full.final_silence_ms:
            problem = f"{full.likely_silence_ms}, must be at most final_silence_ms ({full.final_silence_ms})"
            raise invalid(f"{path}.likely_silence_ms", problem)
        return full

    def boosts(self, given: Iterable[pb.PhraseBoost], path: str) -> list[pb.PhraseBoost]:
        """Check phrases and fill in every default."""
        full = []
        count = 0
        most, longest = self.config.max_phrases, self.config.max_phrase_characters
        for index, boost in enumerate(given):
            here = f"{path}[{index}]"
            value = boost.boost if boost.HasField("boost") else types.PhraseBoost(()).boost
            _within(f"{here}.boost", value, -self.info.max_boost, self.info.max_boost, "nats")
            if not boost.phrases:
                raise invalid(f"{here}.phrases", "empty, at least one phrase is needed")
            count += len(boost.phrases)
            if count > most:
                raise invalid(path, f"more than {most} phrases, at most {most} are accepted")
            for number, phrase in enumerate(boost.phrases):
                self._phrase(phrase, f"{here}.phrases[{number}]", longest)
            full.append(pb.PhraseBoost(phrases=boost.phrases, boost=value))
        return full

    def _phrase(self, phrase: str, path: str, longest: int) -> None:
        if not phrase.strip() or len(phrase) > longest:
            raise invalid(path, f"{len(phrase)} characters, must be 1 to {longest} and not only spaces")
        known = self.info.characters
        odd = set(phrase) - known - {" "} if known else set()
        if odd:
            written = "".join(sorted(odd))
            raise invalid(
                path, f"{written!r} cannot be written by the model; it writes {''.join(sorted(known))!r}"
            )

    def control(self, control: pb.SpeechControl, options: pb.SpeechOptions) -> tuple[Any, Callable[[], None]]:
        """Check a control: the engine's item, and what enters it into `options` once it has been applied."""
        action = control.WhichOneof("action")
        if action is None:
            raise invalid("control.action", "none set, exactly one is needed")
        path = f"control.{action}"
        if action == "set_lookahead":
            return self._lookahead(control.control_id, control.set_lookahead, options, path)
        if action == "set_interim_results":
            enabled = control.set_interim_results.enabled
            item: Any = types.SetInterim(control.control_id, enabled)
            return item, lambda: setattr(options, "interim_results", enabled)
        if action == "set_endpointing":
            if not control.set_endpointing.HasField("rules"):
                raise invalid(f"{path}.rules", "missing, it is required")
            rules = self.endpointing(control.set_endpointing.rules, f"{path}.rules")
            item = types.SetEndpointing(control.control_id, engine_rules(rules))
            return item, lambda: options.endpointing.CopyFrom(rules)
        if action == "set_phrase_boosts":
            boosts = self.boosts(control.set_phrase_boosts.boosts, f"{path}.boosts")

            def replace() -> None:
                del options.boosts[:]
                options.boosts.extend(boosts)

            return types.SetBoosts(control.control_id, engine_boosts(boosts)), replace
        return types.Flush(control.control_id), lambda: None

    def _lookahead(
        self, control_id: str, given: pb.SetLookahead, options: pb.SpeechOptions, path: str
    ) -> tuple[Any, Callable[[], None]]:
        bias = self.bias(given.bias, f"{path}.bias") if given.HasField("bias") else None
        cap = given.max_lookahead_ms if given.HasField("max_lookahead_ms") else None
        if cap is not None:
            _within(f"{path}.max_lookahead_ms", cap, -1, _MOST_CAP_MS, "ms")

        def turn() -> None:
            if bias is not None:
                options.lookahead_bias = bias
            if cap == -1:
                options.ClearField("max_lookahead_ms")
            elif cap is not None:
                options.max_lookahead_ms = cap

        return types.SetLookahead(control_id, bias, cap), turn


def engine_options(audio: pb.AudioFormat, options: pb.SpeechOptions) -> types.SpeechOptions:
    """The engine's options from complete ones."""
    return types.SpeechOptions(
        sample_rate=audio.sample_rate_hz,
        interim_results=options.interim_results,
        word_times=options.word_times,
        beam=options.beam,
        lookahead_bias=options.lookahead_bias,
        max_lookahead_ms=options.max_lookahead_ms if options.HasField("max_lookahead_ms") else None,
        endpointing=engine_rules(options.endpointing),
        boosts=engine_boosts(options.boosts),
    )


def engine_rules(rules: pb.EndpointingRules) -> types.EndpointRules:
    """The engine's endpointing rules from complete ones."""
    return types.EndpointRules(
        likely_silence_ms=rules.likely_silence_ms,
        final_silence_ms=rules.final_silence_ms,
        no_speech_ms=rules.no_speech_ms,
        max_utterance_ms=rules.max_utterance_ms,
        enabled=rules.enabled,
    )


def engine_boosts(boosts: Iterable[pb.PhraseBoost]) -> tuple[types.PhraseBoost, ...]:
    """The engine's phrases from complete ones."""
    return tuple(types.PhraseBoost(tuple(boost.phrases), boost.boost) for boost in boosts)


def _within(path: str, value: float, low: float, high: float, unit: str = "") -> None:
    """Refuse what is not from `low` to `high`; NaN is not."""
    if not low <= value <= high:
        raise invalid(path, f"{value:g}, must be {low:g} to {high:g}{' ' + unit if unit else ''}")
