"""Prompts and the split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realtide.engines.longlive.tokenizer import PromptTokenizer


@pytest.fixture(scope="module")
def prompts(emoji: Callable[[str], Any]) -> Any:
    return emoji("prompts")


def test_every_part_of_a_held_out_triple_is_seen_in_training(prompts: Any) -> None:
    everything, unseen = prompts.triples(), prompts.held_out()
    assert len(set(everything)) == 40 * 7 * 8
    assert len(unseen) == len(everything) // 10
    seen = [triple for triple in everything if triple not in unseen]
    for part in range(3):
        counts = Counter(triple[part] for triple in seen)
        assert set(counts) == {triple[part] for triple in everything}
        assert min(counts.values()) > 20


def test_training_draws_no_held_out_triple(prompts: Any, emoji: Callable[[str], Any]) -> None:
    clips, rng = emoji("clips"), np.random.default_rng(0)
    unseen = prompts.held_out()
    for plan in clips.PLANS:
        for _ in range(40):
            clip = clips.draw(rng, plan)
            assert len(clip.motions) == clips.BLOCKS
            assert (clip.landing is not None) == plan.jump
            for block, motion in enumerate(clip.motions):
                assert (clip.object, motion, clip.background) not in unseen
                if block:
                    assert (motion != clip.motions[block - 1]) == (block in plan.switches)


def test_paraphrases_name_all_parts(prompts: Any) -> None:
    rng = np.random.default_rng(1)
    said = set()
    for triple in prompts.triples()[::5]:
        name, motion, background = triple
        text = prompts.paraphrase(rng, triple).lower()
        assert name in text
        assert background in text
        assert any(phrase in text for phrase in prompts.MOTION_PHRASES[motion])
        said.add(text)
    assert len(said) > 400


def test_no_two_motions_share_a_phrase(prompts: Any) -> None:
    phrases = [phrase for several in prompts.MOTION_PHRASES.values() for phrase in several]
    assert len(phrases) == len(set(phrases))


def test_the_tokenizer_takes_every_prompt(prompts: Any, bundle: Path) -> None:
    tokenizer = PromptTokenizer(bundle / "tokenizer.model", prompts.TOKENS)
    assert tokenizer.vocabulary == prompts.VOCABULARY
    rng = np.random.default_rng(2)
    for triple in prompts.triples()[::3]:
        ids = tokenizer.encode(prompts.paraphrase(rng, triple))
        assert tokenizer._pieces.unk_id() not in ids
    with pytest.raises(ValueError, match="at most 32"):
        tokenizer.encode("a red apple " * 12)
