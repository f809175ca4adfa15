"""Everything the decoder keeps of one stream, and its form in a checkpoint (ours; architecture rule 3).

The size is bounded by the longest utterance (the rules' or the decoder's hard maximum) times the beam,
however long the stream is.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from realtide.engines.ancat.beam import Hypothesis
from realtide.engines.ancat.boost import BoostGraph
from realtide.engines.ancat.endpoint import Endpointer
from realtide.engines.ancat.types import EndpointRules, PhraseBoost, SpeechOptions
from realtide.engines.ancat.words import Token
from realtide.engines.engine import CheckpointMismatch

FORMAT = 3


@dataclass(slots=True)
class DecodeState:
    """One stream's decoder state. Frames count encoder frames from the stream's start, times are seconds."""

    options: SpeechOptions
    endpointer: Endpointer  # of the options; not exported
    graph: BoostGraph | None  # of the options; not exported
    hypotheses: list[Hypothesis] = field(default_factory=lambda: [Hypothesis()])  # best first
    frame: int = 0  # next frame to search
    utterance: int = 0
    start: int = 0  # the utterance's first frame
    rules_from: int = 0  # first frame that the present endpointing rules apply to
    earliest: float = 0.0  # end of the utterance before: no time of this one is less
    shift: float = (
        0.0  # seconds of inserted silence so far: frame times are later than audio times by that much
    )
    # Seconds of audio there are, where known: the front end's padding lets frames reach past it.
    audio_end: float = float("inf")
    speaking: bool = False  # "speech_start" was sent
    likely_for: int | None = None  # frame of the last token when "end_likely" was sent
    shown: str = ""  # text of the last partial
    shown_ids: tuple[int, ...] = ()  # its tokens
    lookahead: Counter[int] = field(
        default_factory=Counter
    )  # of the utterance's frames: how many used how much

    def export(self) -> bytes:
        """Serialize as JSON; the state is unchanged."""
        values = {
            "format": FORMAT,
            "options": asdict(self.options),
            "hypotheses": [
                {
                    "tokens": [list(t) for t in h.tokens],
                    "log_prob": h.log_prob,
                    "boost": h.boost,
                    "node": h.node,
                    "before": list(h.before),
                    "before_frame": h.before_frame,
                    "since": h.since,
                }
                for h in self.hypotheses
            ],
            "lookahead": sorted(self.lookahead.items()),
        }
        values |= {name: getattr(self, name) for name in _PLAIN}
        return json.dumps(values, separators=(",", ":")).encode()


_PLAIN: dict[str, tuple[type, ...]] = {
    "frame": (int,),
    "utterance": (int,),
    "start": (int,),
    "rules_from": (int,),
    "earliest": (float,),
    "shift": (float,),
    "audio_end": (float,),
    "speaking": (bool,),
    "likely_for": (int, type(None)),
    "shown": (str,),
    "shown_ids": (list,),
}


def parse(data: bytes, vocabulary: int) -> tuple[SpeechOptions, dict[str, Any]]:
    """Options and the other fields of an exported state.

    Raises CheckpointMismatch, and nothing else, if damaged.
    """
    try:
        values = json.loads(data)
        if values["format"] != FORMAT:
            raise CheckpointMismatch(f"decoder state has format {values['format']}, expected {FORMAT}")
        fields: dict[str, Any] = {name: _typed(values[name], kinds, name) for name, kinds in _PLAIN.items()}
        fields["shown_ids"] = tuple(fields["shown_ids"])
        fields["hypotheses"] = [_hypothesis(h, vocabulary) for h in values["hypotheses"]]
        fields["lookahead"] = Counter({int(k): int(n) for k, n in values["lookahead"]})
        if not fields["hypotheses"] or not 0 <= fields["start"] <= fields["frame"]:
            raise CheckpointMismatch("decoder state is inconsistent")
        return _options(values["options"]), fields
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointMismatch(f"decoder state is damaged: {error!r}") from None


def _typed(value: Any, kinds: tuple[type, ...], name: str) -> Any:
    if not isinstance(value, kinds):
        raise TypeError(f"{name} is {value!r}")
    return value


def _hypothesis(values: dict[str, Any], vocabulary: int) -> Hypothesis:
    tokens = tuple(Token(int(i), int(f), float(p), int(a)) for i, f, p, a in values["tokens"])
    if not all(0 < token.id < vocabulary for token in tokens):
        raise ValueError("token outside the vocabulary")
    ids = tuple(token.id for token in tokens)
    older, newer = (int(token) for token in values["before"])
    if not (0 <= older < vocabulary and 0 <= newer < vocabulary):
        raise ValueError("token before the utterance outside the vocabulary")
    frame, since = values["before_frame"], int(values["since"])
    if not 0 <= since <= len(ids):
        raise ValueError("context outside the utterance")
    return Hypothesis(
        tokens,
        ids,
        float(values["log_prob"]),
        float(values["boost"]),
        int(values["node"]),
        (older, newer),
        None if frame is None else int(frame),
        since,
    )


def _options(values: dict[str, Any]) -> SpeechOptions:
    rules = EndpointRules(**values["endpointing"])
    boosts = tuple(PhraseBoost(tuple(b["phrases"]), b["boost"]) for b in values["boosts"])
    return SpeechOptions(**(values | {"endpointing": rules, "boosts": boosts}))
