"""Encoder rows in, speech events out, for many streams at once (ours).

Ties the searches to utterances: which rows belong to whom, which search a stream uses, how options and
checkpoints turn into state. The module knows nothing of audio or of the encoder, and keeps no state of a
stream itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from realtide.engines.ancat.beam import beam_search
from realtide.engines.ancat.boost import ROOT, BoostGraph
from realtide.engines.ancat.decode_state import DecodeState, parse
from realtide.engines.ancat.endpoint import Endpointer
from realtide.engines.ancat.search import Float32, Int64, Joiner, greedy
from realtide.engines.ancat.tokenizer import Tokenizer
from realtide.engines.ancat.types import PhraseBoost, SpeechEvent, SpeechOptions
from realtide.engines.ancat.utterance import DecoderConfig, Follower
from realtide.engines.engine import CheckpointMismatch

MAX_BEAM = 8
_GRAPHS_KEPT = 32  # streams of one application boost the same phrases


class Decoder:
    """Decodes many streams with one joiner. Holds only what streams share: model parts and boost graphs."""

    def __init__(self, joiner: Joiner, tokenizer: Tokenizer, config: DecoderConfig | None = None) -> None:
        self.config = config or DecoderConfig()
        self._joiner = joiner
        self._tokenizer = tokenizer
        self._graphs: OrderedDict[tuple[PhraseBoost, ...], BoostGraph] = OrderedDict()

    def new_state(self, options: SpeechOptions) -> DecodeState:
        """State of a stream that starts now. Raises ValueError for options this decoder cannot serve."""
        if not 1 <= options.beam <= MAX_BEAM:
            raise ValueError(f"beam must be in 1..{MAX_BEAM}, got {options.beam}")
        return DecodeState(options, self._endpointer(options), self._graph(options.boosts))

    def set_options(self, state: DecodeState, options: SpeechOptions) -> None:
        """Change options from the next frame on; the beam stays what it was.

        Raises ValueError, leaving the state as it is, for options this decoder cannot serve. New endpointing
        rules may end the present utterance with the next frame at the earliest. New phrases match from the
        next token on.
        """
        if options.beam != state.options.beam:
            raise ValueError(f"beam must stay {state.options.beam}, got {options.beam}")
        endpointer, graph = self._endpointer(options), self._graph(options.boosts)
        if endpointer != state.endpointer:
            state.rules_from = state.frame
        if options.boosts != state.options.boosts:
            old = state.graph
            state.hypotheses = [
                h._replace(boost=h.boost - (old.pending(h.node) if old else 0.0), node=ROOT)
                for h in state.hypotheses
            ]
            state.hypotheses.sort(key=lambda h: -h.score)
        state.options, state.endpointer, state.graph = options, endpointer, graph

    def restore(self, data: bytes, options: SpeechOptions | None = None) -> DecodeState:
        """Continue an exported state, with other options if given.

        Raises CheckpointMismatch, ValueError (options).
        """
        exported, fields = parse(data, self._tokenizer.vocabulary)
        try:
            state = self.new_state(exported)
        except ValueError as error:
            raise CheckpointMismatch(f"decoder state does not fit this model: {error}") from None
        for name, value in fields.items():
            setattr(state, name, value)
        nodes = 1 if state.graph is None else len(state.graph)
        if len(state.hypotheses) > exported.beam or not all(0 <= h.node < nodes for h in state.hypotheses):
            raise CheckpointMismatch("decoder state does not fit its own options")
        if options is not None:
            self.set_options(state, options)
        return state

    def advance(
        self,
        states: Sequence[DecodeState],
        enc: Float32,
        avail: Int64,
        counts: Sequence[int],
        *,
        final: Sequence[str | None] | None = None,
    ) -> list[list[SpeechEvent]]:
        """Search encoder rows `enc` [M, J]; `counts[s]` contiguous rows are the next frames of stream s.

        `avail` [M] is the newest encoder input frame that had to exist for each row. `final[s]` ("flush",
        "finish" or None) ends stream s' utterance after its rows: "flush" always gives a Final; "finish"
        gives one unless nothing was searched since the last one. Returns each stream's events in order.
        """
        ends = np.cumsum([0, *counts]).tolist()
        newest = avail.tolist()
        followers = [
            Follower(state, newest[ends[s] : ends[s + 1]], self._tokenizer, self.config)
            for s, state in enumerate(states)
        ]
        for beams in (False, True):
            group = [s for s, state in enumerate(states) if counts[s] and (state.options.beam > 1) == beams]
            if not group:
                continue
            members = [followers[s] for s in group]
            sizes = [counts[s] for s in group]
            rows = enc
            if sum(sizes) != len(enc):
                rows = np.concatenate([enc[ends[s] : ends[s + 1]] for s in group])
            if beams:
                beam_search(self._joiner, rows, members, sizes, self.config.repeat_gain)
            else:
                greedy(self._joiner, rows, members, sizes, self.config.max_symbols, self.config.repeat_gain)
        for s, follower in enumerate(followers):
            reason = None if final is None else final[s]
            if reason is None:
                follower.settle()
            else:
                follower.finish(reason)
        return [follower.events for follower in followers]

    def _endpointer(self, options: SpeechOptions) -> Endpointer:
        return Endpointer.of(
            options.endpointing, self.config.timing.frame_ms, self.config.hard_max_utterance_ms
        )

    def _graph(self, boosts: tuple[PhraseBoost, ...]) -> BoostGraph | None:
        """The phrases' graph; raises ValueError for a phrase that the model cannot write."""
        if not any(b.phrases for b in boosts):
            return None
        graph = self._graphs.get(boosts)
        if graph is None:
            phrases = [(tuple(self._tokenizer.encode(p)), b.boost) for b in boosts for p in b.phrases]
            graph = self._graphs[boosts] = BoostGraph(phrases, self._tokenizer.vocabulary)
            if len(self._graphs) > _GRAPHS_KEPT:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(boosts)
        return graph
