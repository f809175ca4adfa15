"""The decoder: utterances, events, options and checkpoints, against a frame-by-frame clock of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import exp, log
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realtide.engines.ancat.decode_state import DecodeState
from realtide.engines.ancat.decoder import Decoder
from realtide.engines.ancat.types import (
    EndpointEvent,
    EndpointRules,
    Final,
    Partial,
    PhraseBoost,
    SpeechEvent,
    SpeechOptions,
)
from realtide.engines.ancat.utterance import DecoderConfig
from realtide.engines.ancat.words import WordTiming
from realtide.engines.engine import CheckpointMismatch
from tests.engines.ancat.toys import ToyJoiner, rows_of, split, toy_tokenizer

RULES = EndpointRules(likely_silence_ms=120, final_silence_ms=280, no_speech_ms=600, max_utterance_ms=1400)
OPTIONS = SpeechOptions(endpointing=RULES)
BOOSTS = (PhraseBoost(("ac", "b e"), 1.0), PhraseBoost(("acd",), 1.5))


def about(value: float) -> Any:
    """`pytest.approx` inside tuples and dataclasses, where its own type does not fit."""
    return pytest.approx(value)


@dataclass
class Source:
    """A stream's encoder rows and their availability."""

    enc: np.ndarray
    avail: np.ndarray

    @classmethod
    def of(cls, seed: int, frames: int) -> Source:
        ahead = np.random.default_rng(seed + 77).integers(0, 5, frames)
        return cls(rows_of(seed, frames), np.arange(frames) + ahead)


class ScriptJoiner:
    """Says exactly what each row's first two numbers say: (token, posterior), once per row."""

    def __call__(self, enc: np.ndarray, contexts: np.ndarray) -> np.ndarray:
        out = np.full((len(enc), 7), -20.0, np.float32)
        for k, (row, context) in enumerate(zip(enc, contexts, strict=True)):
            token, posterior = int(row[0]), row[1]
            said = token == 0 or context[1] == token
            out[k, 0] = 0.0 if said else log(1 - posterior)
            if not said:
                out[k, token] = log(posterior)
        return out


def script(frames: int, tokens: dict[int, int], posterior: float = 0.8) -> Source:
    """Rows that emit `tokens[frame]`, with no lookahead. A token must differ from the one before it."""
    enc = np.zeros((frames, 2), np.float32)
    for frame, token in tokens.items():
        enc[frame] = token, posterior
    return Source(enc, np.arange(frames))


def run(
    decoder: Decoder,
    states: list[DecodeState],
    sources: list[Source],
    sizes: list[list[int]],
    finish: bool = True,
) -> list[list[SpeechEvent]]:
    """Feed every stream in chunks of its own sizes, all live streams in one call."""
    events: list[list[SpeechEvent]] = [[] for _ in states]
    first = [state.frame for state in states]
    chunks = [list(split(len(s.enc) - f, z)) for s, f, z in zip(sources, first, sizes, strict=True)]
    for step in range(max(map(len, chunks)) + 1):
        live = [k for k in range(len(states)) if step <= len(chunks[k])]
        parts, final = [], []
        for k in live:
            last = step == len(chunks[k])
            part = slice(0, 0) if last else chunks[k][step]
            parts.append(Source(sources[k].enc[first[k] :][part], sources[k].avail[first[k] :][part]))
            final.append("finish" if last and finish else None)
        news = decoder.advance(
            [states[k] for k in live],
            np.concatenate([p.enc for p in parts]),
            np.concatenate([p.avail for p in parts]),
            [len(p.enc) for p in parts],
            final=final,
        )
        for k, new in zip(live, news, strict=True):
            events[k].extend(new)
    return events


def fixed(events: list[SpeechEvent]) -> list[SpeechEvent]:
    """The events that must not depend on chunking: all but partials that come without a new likely end."""
    before: list[SpeechEvent | None] = [None, *events]
    return [
        event
        for last, event in zip(before, events, strict=False)
        if not isinstance(event, Partial) or (isinstance(last, EndpointEvent) and last.kind == "end_likely")
    ]


def clock(joiner: ToyJoiner, source: Source, rules: EndpointRules) -> list[tuple[str, str, float, float]]:
    """Greedy decoding with a clock, frame by frame.

    ("final"|event, text or reason, seconds, lookahead mean).
    """
    out: list[tuple[str, str, float, float]] = []
    before, ids = [0, 0], list[int]()  # tokens of the utterance before, and of this one
    start, last, likely = 0, 0, False
    ahead: list[int] = []

    def final(frame: int, reason: str) -> None:
        nonlocal before, ids, start, likely, ahead
        out.append((reason, toy_tokenizer().decode(ids), (frame + 1) * 0.04, float(np.mean(ahead)) * 0.04))
        before = [*before, *ids][-2:]
        ids, start, likely, ahead = [], frame + 1, False, []

    for frame, row in enumerate(source.enc):
        for _ in range(3):
            context = tuple([*before, *ids][-2:])
            token = int(joiner.one(row, (context[0], context[1])).argmax())
            if token == 0:
                break
            if not ids:
                out.append(("speech_start", "", frame * 0.04, 0.0))
            ids, last, likely = [*ids, token], frame, False
        ahead.append(int(source.avail[frame]) - frame)
        silence, length = (frame - last) * 40, (frame + 1 - start) * 40
        if ids and silence >= rules.likely_silence_ms and not likely:
            likely = True
            out.append(("end_likely", toy_tokenizer().decode(ids), (frame + 1) * 0.04, 0.0))
        if ids and silence >= rules.final_silence_ms:
            final(frame, "endpoint")
        elif not ids and length >= rules.no_speech_ms:
            final(frame, "no_speech")
        elif length >= rules.max_utterance_ms:
            final(frame, "max_length")
    if start < len(source.enc):
        final(len(source.enc) - 1, "finish")
    return out


def flattened(events: list[SpeechEvent]) -> list[tuple[str, str, float, float]]:
    """Our events in the form of `clock`."""
    out: list[tuple[str, str, float, float]] = []
    for event in events:
        if isinstance(event, Final):
            out.append((event.reason, event.text, event.end, event.lookahead_mean))
        elif isinstance(event, Partial) and event.end_likely:
            assert out[-1][0] == "end_likely"
            out[-1] = ("end_likely", event.text, event.audio_processed, 0.0)
        elif isinstance(event, EndpointEvent) and event.kind != "end":
            out.append((event.kind, "", event.at, 0.0))
    return out


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    frames=st.integers(1, 120),
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any),
    interim=st.booleans(),
)
def test_equals_decoding_with_a_clock(seed: int, frames: int, sizes: list[int], interim: bool) -> None:
    joiner, source = ToyJoiner(seed, blank=1.0), Source.of(seed, frames)
    decoder = Decoder(joiner, toy_tokenizer())
    state = decoder.new_state(replace(OPTIONS, interim_results=interim))
    ours = flattened(run(decoder, [state], [source], [sizes])[0])
    theirs = clock(joiner, source, RULES)
    if not interim:  # the text at a likely end is a partial's
        theirs = [(kind, "" if kind == "end_likely" else text, at, mean) for kind, text, at, mean in theirs]
    assert [t[:2] for t in ours] == [t[:2] for t in theirs]
    np.testing.assert_allclose([t[2:] for t in ours], [t[2:] for t in theirs])


def test_the_comparison_covers_every_kind() -> None:
    kinds = {
        kind
        for seed in range(12)
        for kind, *_ in clock(ToyJoiner(seed, blank=1.0), Source.of(seed, 120), RULES)
    }
    assert kinds == {
        "speech_start",
        "end_likely",
        "endpoint",
        "no_speech",
        "max_length",
        "finish",
    }


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    beams=st.lists(st.sampled_from((1, 2, 4)), min_size=1, max_size=4),
    boosted=st.booleans(),
    sizes=st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=3).filter(any), min_size=4, max_size=4),
    cut=st.integers(0, 60),
    memory=st.integers(1, 20),
)
def test_chunking_batch_and_checkpoints_change_nothing(
    seed: int, beams: list[int], boosted: bool, sizes: list[list[int]], cut: int, memory: int
) -> None:
    """Each stream alone, frame by frame, against all together in any chunks with a checkpoint in between."""
    config = DecoderConfig(repeat_gain=2.0, repeat_frames=3, context_frames=memory)
    decoder = Decoder(ToyJoiner(seed, blank=1.0), toy_tokenizer(), config)
    options = [replace(OPTIONS, beam=b, boosts=BOOSTS if boosted else ()) for b in beams]
    sources = [Source.of(seed + k, 60 + 7 * k) for k in range(len(beams))]
    alone = [
        run(decoder, [decoder.new_state(o)], [s], [[1]])[0] for o, s in zip(options, sources, strict=True)
    ]
    states = [decoder.new_state(o) for o in options]
    heads = [Source(s.enc[:cut], s.avail[:cut]) for s in sources]
    events = run(decoder, states, heads, sizes[: len(beams)], finish=False)
    exports = [state.export() for state in states]
    other = Decoder(ToyJoiner(seed, blank=1.0), toy_tokenizer(), config)
    restored = [other.restore(data) for data in exports]
    assert [state.export() for state in restored] == exports
    rest = run(other, restored, sources, sizes[: len(beams)])
    uninterrupted = run(decoder, states, sources, sizes[: len(beams)])
    assert rest == uninterrupted
    for k in range(len(beams)):
        assert fixed(events[k] + rest[k]) == fixed(alone[k])


def test_words_times_confidence_and_lookahead() -> None:
    source = script(40, {3: 1, 5: 3, 9: 2}, posterior=0.8)
    source.avail[:] += 2
    source.avail[9] += 3
    timing = WordTiming(40, start_offset_ms=-40, end_offset_ms=20)
    decoder = Decoder(ScriptJoiner(), toy_tokenizer(), DecoderConfig(timing=timing))
    (events,) = run(decoder, [decoder.new_state(OPTIONS)], [source], [[40]])
    final = next(e for e in events if isinstance(e, Final))
    first, second = final.words
    assert (first.text, first.start, first.end) == ("ac", about(0.08), about(0.26))
    assert (second.text, second.start, second.end) == ("b", about(0.32), about(0.42))
    assert (first.lookahead, second.lookahead) == pytest.approx((0.08, 0.20))
    assert final.confidence == about(0.8)
    assert (final.reason, final.speech_end, final.end) == ("endpoint", second.end, about(0.68))
    assert (final.lookahead_mean, final.lookahead_p90) == pytest.approx((0.08 + 0.12 / 17, 0.08))
    assert events[0] == EndpointEvent("speech_start", about(0.08), 0)


@pytest.mark.parametrize("beam", [1, 3])
def test_the_predictor_remembers_the_last_words_over_an_endpoint_but_not_for_ever(beam: int) -> None:
    class Spy(ScriptJoiner):
        seen: dict[int, tuple[int, ...]] = {}  # noqa: RUF012  # of the last look at each row

        def __call__(self, enc: np.ndarray, contexts: np.ndarray) -> np.ndarray:
            for row, context in zip(enc, contexts, strict=True):
                self.seen.setdefault(int(row[2]), tuple(context.tolist()))
            return super().__call__(enc, contexts)

    source = script(40, {2: 1, 3: 3, 30: 2}, posterior=1 - 1e-6)
    source.enc = np.column_stack([source.enc, np.arange(40)]).astype(np.float32)
    joiner = Spy()
    decoder = Decoder(joiner, toy_tokenizer(), DecoderConfig(context_frames=15))
    state = decoder.new_state(replace(OPTIONS, beam=beam))
    texts = []
    for frame in range(40):
        rows = source.enc[frame : frame + 1], source.avail[frame : frame + 1]
        events = decoder.advance([state], *rows, [1])[0]
        texts += [event.text for event in events if isinstance(event, Final)]
    assert [text for text in texts if text] == ["ac", "b"]
    assert joiner.seen[4] == joiner.seen[10] == joiner.seen[17] == (1, 3)  # frame 10 is the next utterance's
    assert joiner.seen[18] == joiner.seen[29] == (0, 0)
    assert joiner.seen[31] == (0, 2)


def test_p90_is_the_nearest_rank() -> None:
    source = script(10, {})
    source.avail[:] += np.array([0, 0, 0, 0, 0, 0, 0, 0, 3, 9])
    decoder = Decoder(ScriptJoiner(), toy_tokenizer())
    (events,) = run(decoder, [decoder.new_state(SpeechOptions())], [source], [[4]])
    (final,) = events
    assert isinstance(final, Final)
    assert final.lookahead_p90 == about(0.12)
    assert final.lookahead_mean == about(1.2 * 0.04)


def test_partials_come_when_the_text_changes_or_the_end_is_likely() -> None:
    decoder = Decoder(ScriptJoiner(), toy_tokenizer())
    state = decoder.new_state(OPTIONS)
    source = script(12, {2: 1, 4: 3, 5: 2})
    seen = []
    for frame in range(12):
        (events,) = decoder.advance(
            [state], source.enc[frame : frame + 1], source.avail[frame : frame + 1], [1]
        )
        seen += [(frame, e.text, e.end_likely) for e in events if isinstance(e, Partial)]
    assert seen == [(2, "a", False), (4, "ac", False), (5, "ac b", False), (8, "ac b", True)]


def test_speech_after_a_likely_end_takes_it_back() -> None:
    decoder = Decoder(ScriptJoiner(), toy_tokenizer())
    source = script(18, {0: 1, 5: 3, 13: 2})
    (events,) = run(decoder, [decoder.new_state(OPTIONS)], [source], [[1]])
    partials = [(e.text, e.end_likely) for e in events if isinstance(e, Partial)]
    assert partials == [("a", False), ("a", True), ("ac", False), ("ac", True), ("b", False), ("b", True)]
    kinds = [(e.kind, e.utterance) for e in events if isinstance(e, EndpointEvent)]
    assert kinds == [
        ("speech_start", 0),
        ("end_likely", 0),
        ("end_likely", 0),
        ("end", 0),
        ("speech_start", 1),
        ("end_likely", 1),
    ]


def test_no_partials_and_no_words_unless_asked_for() -> None:
    decoder = Decoder(ScriptJoiner(), toy_tokenizer())
    source = script(20, {2: 1, 4: 3})
    options = replace(OPTIONS, interim_results=False, word_times=False)
    (events,) = run(decoder, [decoder.new_state(options)], [source], [[2]])
    assert not any(isinstance(e, Partial) for e in events)
    finals = [e for e in events if isinstance(e, Final)]
    assert next((f.text, f.words, f.speech_end) for f in finals) == ("ac", (), about(0.2))


def test_stability_counts_words_that_cannot_or_will_hardly_change() -> None:
    decoder = Decoder(ScriptJoiner(), toy_tokenizer(), DecoderConfig(stable_frames=2))
    state = decoder.new_state(replace(OPTIONS, endpointing=EndpointRules(enabled=False)))
    source = script(12, {0: 1, 1: 2, 2: 3, 4: 5, 5: 4, 9: 2})
    stabilities = []
    for frame in range(12):
        (events,) = decoder.advance(
            [state], source.enc[frame : frame + 1], source.avail[frame : frame + 1], [1]
        )
        stabilities += [(e.text, e.stability) for e in events if isinstance(e, Partial)]
    assert stabilities == [
        ("a", 0.0),
        ("a b", 0.5),
        ("a bc", 0.5),
        ("a bc e", about(2 / 3)),
        ("a bc ed", about(2 / 3)),
        ("a bc ed b", 0.75),
    ]


def test_stability_in_a_beam_needs_agreement() -> None:
    seen = set()
    for seed in range(10):
        decoder = Decoder(ToyJoiner(seed, blank=1.0), toy_tokenizer())
        state = decoder.new_state(replace(OPTIONS, beam=4, endpointing=EndpointRules(enabled=False)))
        source = Source.of(seed, 40)
        for frame in range(40):
            (events,) = decoder.advance(
                [state], source.enc[frame : frame + 1], source.avail[frame : frame + 1], [1]
            )
            for partial in (e for e in events if isinstance(e, Partial)):
                words = toy_tokenizer().words(state.hypotheses[0].ids)
                for k in range(round(partial.stability * len(words))):
                    last = words[k][2]
                    old = frame - state.hypotheses[0].tokens[last].frame > 8
                    same = {h.ids[: last + 2] for h in state.hypotheses}
                    assert old or len(same) == 1
                    seen.add(old)
    assert seen == {True, False}


def test_flush_gives_a_final_and_the_stream_goes_on() -> None:
    decoder = Decoder(ScriptJoiner(), toy_tokenizer())
    state = decoder.new_state(OPTIONS)
    source = script(10, {2: 1, 7: 2})
    (events,) = decoder.advance([state], source.enc[:5], source.avail[:5], [5], final=["flush"])
    final = events[-1]
    assert isinstance(final, Final)
    assert (final.text, final.reason, final.utterance) == ("a", "flush", 0)
    assert not any(isinstance(e, EndpointEvent) and e.kind == "end" for e in events)
    (events,) = decoder.advance([state], source.enc[:0], source.avail[:0], [0], final=["flush"])
    assert [(e.text, e.reason, e.start, e.end) for e in events if isinstance(e, Final)] == [
        ("", "flush", about(0.2), about(0.2))
    ]
    (events,) = decoder.advance([state], source.enc[5:], source.avail[5:], [5], final=["finish"])
    final = events[-1]
    assert isinstance(final, Final)
    assert (final.text, final.reason, final.utterance) == ("b", "finish", 2)
    assert final.start == about(0.2)
    (events,) = decoder.advance([state], source.enc[:0], source.avail[:0], [0], final=["finish"])
    assert events == []


def test_finish_without_audio_gives_one_empty_final() -> None:
    decoder = Decoder(ScriptJoiner(), toy_tokenizer())
    state = decoder.new_state(SpeechOptions())
    nothing = script(0, {})
    (events,) = decoder.advance([state], nothing.enc, nothing.avail, [0], final=["finish"])
    (final,) = events
    assert isinstance(final, Final)
    assert (final.text, final.words, final.confidence, final.end) == ("", (), 0.0, 0.0)
    assert (final.lookahead_mean, final.lookahead_p90) == (0.0, 0.0)


def test_times_stay_within_the_audio_and_skip_inserted_silence() -> None:
    decoder = Decoder(ScriptJoiner(), toy_tokenizer())
    state = decoder.new_state(OPTIONS)
    source = script(12, {4: 1, 6: 2})
    state.audio_end = 0.19  # the fifth frame was completed with 10 ms of silence
    (events,) = decoder.advance([state], source.enc[:5], source.avail[:5], [5], final=["flush"])
    final = events[-1]
    assert isinstance(final, Final)
    assert (final.end, final.words[0].end) == (0.19, 0.19)
    state.shift, state.audio_end = 0.01, float("inf")
    (events,) = decoder.advance([state], source.enc[5:], source.avail[5:], [7])
    partial = next(e for e in events if isinstance(e, Partial))
    assert (partial.words[0].start, partial.audio_processed) == pytest.approx((0.23, 0.39))
    start = next(e for e in events if isinstance(e, EndpointEvent))
    assert start.at == about(0.23)


def test_new_rules_apply_from_the_next_frame() -> None:
    decoder = Decoder(ScriptJoiner(), toy_tokenizer())
    state = decoder.new_state(replace(OPTIONS, endpointing=EndpointRules()))
    source = script(20, {2: 1})
    decoder.advance([state], source.enc[:15], source.avail[:15], [15])
    short = EndpointRules(likely_silence_ms=40, final_silence_ms=80)
    decoder.set_options(state, replace(OPTIONS, endpointing=short))
    (events,) = decoder.advance([state], source.enc[15:], source.avail[15:], [5])
    final = next(e for e in events if isinstance(e, Final))
    assert (final.reason, final.end) == ("endpoint", about(0.64))
    assert state.start == 16


def test_disabled_endpointing_is_quiet_and_still_bounded() -> None:
    config = DecoderConfig(hard_max_utterance_ms=2000)
    for beam in (1, 4):
        decoder = Decoder(ToyJoiner(1, blank=-2.0), toy_tokenizer(), config)
        state = decoder.new_state(SpeechOptions(endpointing=EndpointRules(enabled=False), beam=beam))
        sizes, finals = [], []
        for k in range(40):
            source = Source.of(k, 40)
            start = state.frame
            (events,) = decoder.advance([state], source.enc, source.avail + start, [40])
            assert {e.kind for e in events if isinstance(e, EndpointEvent)} <= {"end"}
            finals += [e for e in events if isinstance(e, Final)]
            sizes.append(len(state.export()))
        assert max(sizes[5:]) <= 2 * max(sizes[:5])
        assert {f.reason for f in finals} == {"max_length"}
        assert [round(f.end - f.start, 6) for f in finals] == [2.0] * 32


def test_boosting_changes_words_and_may_change_while_running() -> None:
    for beam in (1, 4):
        changed = 0
        for seed in range(8):
            decoder = Decoder(ToyJoiner(seed, blank=1.0), toy_tokenizer())
            source = Source.of(seed, 40)
            options = replace(OPTIONS, beam=beam)
            plain, boosted = decoder.new_state(options), decoder.new_state(options)
            decoder.advance([boosted], source.enc[:20], source.avail[:20], [20])
            decoder.set_options(boosted, replace(options, boosts=(PhraseBoost(("bd",), 5.0),)))
            tail = run(decoder, [boosted], [source], [[7]])[0]
            (whole,) = run(decoder, [plain], [source], [[7]])
            texts = [" ".join(e.text for e in es if isinstance(e, Final)) for es in (whole, tail)]
            changed += texts[0] != texts[1]
            decoder.set_options(boosted, options)
            assert boosted.graph is None
            assert all(h.node == 0 for h in boosted.hypotheses)
        assert changed > 2


def test_replacing_boosts_takes_back_unfinished_matches() -> None:
    decoder = Decoder(ToyJoiner(3, blank=0.0), toy_tokenizer())
    options = replace(OPTIONS, beam=4, boosts=(PhraseBoost(("acdc b e acd",), 2.0),))
    state = decoder.new_state(options)
    source = Source.of(3, 8)
    decoder.advance([state], source.enc, source.avail, [8])
    assert any(h.boost > 0 for h in state.hypotheses)
    decoder.set_options(state, replace(options, boosts=()))
    assert [h.boost for h in state.hypotheses] == pytest.approx([0.0] * 4, abs=1e-6)
    scores = [h.score for h in state.hypotheses]
    assert scores == sorted(scores, reverse=True)


def test_alternatives_are_distinct_texts_best_first() -> None:
    decoder = Decoder(ToyJoiner(5, blank=0.5), toy_tokenizer())
    state = decoder.new_state(SpeechOptions(beam=6))
    source = Source.of(5, 20)
    (events,) = run(decoder, [state], [source], [[20]])
    final = events[-1]
    assert isinstance(final, Final)
    texts = [text for text, _ in final.alternatives]
    assert texts[0] == final.text
    assert len(set(texts)) == len(texts) > 1
    assert sum(exp(p) for _, p in final.alternatives) <= 1.0


def test_a_wider_beam_finds_likelier_texts() -> None:
    better = 0
    for seed in range(10):
        decoder = Decoder(ToyJoiner(seed, blank=0.5), toy_tokenizer())
        source = Source.of(seed, 30)
        finals = []
        for beam in (2, 8):
            state = decoder.new_state(SpeechOptions(beam=beam, endpointing=EndpointRules(enabled=False)))
            (events,) = run(decoder, [state], [source], [[30]])
            finals.append(next(e for e in events if isinstance(e, Final)))
        better += finals[1].alternatives[0][1] > finals[0].alternatives[0][1]
    assert better >= 8


def test_options_that_cannot_be_served_are_refused() -> None:
    decoder = Decoder(ScriptJoiner(), toy_tokenizer())
    for beam in (0, 9):
        with pytest.raises(ValueError, match=r"1\.\.8"):
            decoder.new_state(SpeechOptions(beam=beam))
    with pytest.raises(ValueError, match="does not write"):
        decoder.new_state(SpeechOptions(boosts=(PhraseBoost(("xyz",)),)))
    state = decoder.new_state(SpeechOptions())
    before = state.export()
    for options in (
        SpeechOptions(beam=2),
        SpeechOptions(boosts=(PhraseBoost(("xyz",)),)),
        SpeechOptions(endpointing=EndpointRules(max_utterance_ms=0)),
    ):
        with pytest.raises(ValueError, match=r"must|does not write"):
            decoder.set_options(state, options)
        assert state.export() == before
    assert decoder.new_state(SpeechOptions(boosts=(PhraseBoost(()),))).graph is None


def test_restore_refuses_damage() -> None:
    decoder = Decoder(ToyJoiner(1), toy_tokenizer())
    state = decoder.new_state(replace(OPTIONS, beam=2, boosts=BOOSTS))
    source = Source.of(1, 12)
    decoder.advance([state], source.enc, source.avail, [12])
    good = json.loads(state.export())

    def refused(**changes: object) -> None:
        with pytest.raises(CheckpointMismatch):
            decoder.restore(json.dumps(good | changes).encode())

    for data in (b"", b"\xff", b"[]", b"null", b"{}", state.export()[:-5]):
        with pytest.raises(CheckpointMismatch):
            decoder.restore(data)
    refused(format=1)
    refused(frame="12")
    refused(start=13)
    refused(hypotheses=[])
    refused(hypotheses=good["hypotheses"] * 2)
    refused(hypotheses=[good["hypotheses"][0] | {"node": 99}])
    refused(hypotheses=[good["hypotheses"][0] | {"tokens": [[99, 1, -0.1, 1]]}])
    refused(hypotheses=[good["hypotheses"][0] | {"tokens": [[1, 1]]}])
    for before in ([99, 0], [0, -1], [0], 3):
        refused(hypotheses=[good["hypotheses"][0] | {"before": before}])
    refused(lookahead=3)
    refused(options=good["options"] | {"beam": 99})
    refused(options=good["options"] | {"unheard": 1})
    refused(options=good["options"] | {"boosts": [{"phrases": ["xyz"], "boost": 1.0}]})
    assert decoder.restore(json.dumps(good).encode()).export() == state.export()


def test_restore_with_other_options() -> None:
    decoder = Decoder(ToyJoiner(1), toy_tokenizer())
    state = decoder.new_state(replace(OPTIONS, boosts=BOOSTS))
    source = Source.of(1, 12)
    decoder.advance([state], source.enc, source.avail, [12])
    changed = decoder.restore(state.export(), replace(OPTIONS, interim_results=False))
    assert changed.graph is None
    assert not changed.options.interim_results
    assert changed.hypotheses[0].ids == state.hypotheses[0].ids
