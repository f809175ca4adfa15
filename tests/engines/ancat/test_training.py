"""Training: every rule learns, gradients reach the schedulers, arcs are soft first and hard later."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from realtide.engines.ancat.config import EncoderConfig
from realtide.engines.ancat.model import Transducer
from realtide.engines.ancat.training import ArcSampler, Batch, Schedule, average, losses
from tests.engines.ancat.oracle import small_config, wild

RECIPE = Path(__file__).parents[3] / "models" / "ancat-commands-en" / "recipe"


def tiny_batch(config: EncoderConfig) -> Batch:
    """Two utterances of different length; the frames of token k show pattern k."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(4, config.window, config.mel_bins, generator=generator)
    targets = torch.tensor([[1, 2, 3], [3, 1, 0]])
    windows = 0.1 * torch.randn(2, 12, config.window, config.mel_bins, generator=generator)
    labels = torch.full((2, 12), -100)
    for b, k in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        windows[b, 1 + 3 * k : 3 + 3 * k] += patterns[targets[b, k]]
        labels[b, 1 + 3 * k] = targets[b, k]
    lengths = torch.tensor([3, 2])
    return Batch(windows, torch.tensor([12, 8]), targets, lengths, targets, lengths, labels)


def schedule(**changes: object) -> Schedule:
    return Schedule(**({"dropout": 0.0, "steps": 100} | changes))  # type: ignore[arg-type]


def sampler(config: EncoderConfig, plan: Schedule, progress: float, rule: str | None = None) -> ArcSampler:
    generator = torch.Generator().manual_seed(1)
    return ArcSampler(config, plan, progress, rule or config.rule, generator, 2)


@pytest.mark.parametrize(
    ("rule", "right"), [("adaptive", 3), ("causal", 0), ("layerwise", 2), ("chunked", 3)]
)
def test_a_few_steps_of_every_rule_learn_a_batch(rule: str, right: int) -> None:
    config = small_config(rule=rule, right=right, layers=2)
    torch.manual_seed(0)
    model = Transducer(config).train()
    batch, plan = tiny_batch(config), schedule(align_weight=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    seen = []
    for step in range(40):
        parts = losses(model, batch, sampler(config, plan, step / 40), plan, bf16=False)
        assert set(parts) == {"rnnt", "ctc", "align", "total"}
        optimizer.zero_grad()
        torch.autograd.backward(parts["total"])
        optimizer.step()
        seen.append(float(parts["rnnt"].detach()))
    assert seen[-1] < 0.3 * seen[0]


@pytest.mark.parametrize("progress", [0.0, 0.8])
@pytest.mark.parametrize("penalty", ["none", "naive", "algorithmic", "compute"])
def test_gradients_reach_every_scheduler(penalty: str, progress: float) -> None:
    config = small_config(right=3)
    model = wild(config).train()
    weights = {} if penalty == "none" else {penalty: 0.5}
    plan = schedule(**weights)
    parts = losses(model, tiny_batch(config), sampler(config, plan, progress), plan, bf16=False)
    assert (penalty in parts) == bool(weights)
    torch.autograd.backward(parts["total"])
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        assert torch.isfinite(value.grad).all(), name
        if "scheduler.out.weight" in name:
            assert float(value.grad.abs().sum()) > 0, name


def test_a_penalty_closes_arcs_where_nothing_asks_for_them() -> None:
    config = small_config(right=3, layers=2)
    model = wild(config).train()
    plan = schedule(algorithmic=5.0, rnnt_weight=0.0, ctc_weight=0.0)
    schedulers = [p for name, p in model.named_parameters() if "scheduler" in name]
    optimizer = torch.optim.Adam(schedulers, 0.05)
    seen = []
    for _ in range(30):
        parts = losses(model, tiny_batch(config), sampler(config, plan, 0.0), plan, bf16=False)
        optimizer.zero_grad()
        torch.autograd.backward(parts["total"])
        optimizer.step()
        seen.append(float(parts["algorithmic"].detach()))
    assert seen[-1] < 0.5 * seen[0]


def test_arcs_are_soft_first_and_hard_later() -> None:
    config = small_config(right=3)
    scores = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(2), requires_grad=True)
    plan = schedule()
    early, late = sampler(config, plan, 0.1), sampler(config, plan, 0.7)
    soft = early(0, scores, 9)
    assert ((soft > 0) & (soft < 1)).any()
    assert (soft[..., 1:] <= soft[..., :-1]).all()  # a span: farther arcs are never more open
    assert early.soft[0] is soft
    hard = late(0, scores, 9)
    torch.testing.assert_close(hard.detach(), (late.soft[0] >= 0.5).float())
    assert set(hard.detach().round().flatten().tolist()) == {0.0, 1.0}
    weight = torch.linspace(1, 2, hard.numel()).view_as(hard)
    (straight,) = torch.autograd.grad((hard * weight).sum(), scores, retain_graph=True)
    (through,) = torch.autograd.grad((late.soft[0] * weight).sum(), scores)
    torch.testing.assert_close(straight, through)
    assert straight.abs().sum() > 0


def test_the_temperature_falls_and_the_noise_fades() -> None:
    config, plan = small_config(right=3), schedule(temperature=(1.0, 0.25))
    samplers = [sampler(config, plan, progress) for progress in (0.0, 0.5, 1.0)]
    assert [s.temperature for s in samplers] == pytest.approx([1.0, 0.5, 0.25])
    assert [s.hard for s in samplers] == [False, False, True]
    assert [s.noise for s in samplers] == [1.0, 1.0, 0.0]
    assert 0 < sampler(config, plan, 0.75).noise < 1
    scores = torch.randn(2, 5, 3)
    torch.testing.assert_close(samplers[2](0, scores, 5), samplers[2](0, scores, 5))


def test_biases_are_drawn_per_utterance_and_bounded() -> None:
    config, plan = small_config(right=3), schedule(bias_range=4.0)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([ArcSampler(config, plan, 0.0, "adaptive", generator, 8).bias for _ in range(40)])
    assert drawn.shape == (320, 1, 1)
    assert 3 < float(drawn.max()) <= 4
    assert -4 <= float(drawn.min()) < -3


@pytest.mark.parametrize("rule", ["causal", "layerwise", "chunked"])
def test_mixed_training_draws_fixed_arcs_of_every_size(rule: str) -> None:
    config, plan = small_config(right=15), schedule()
    generator = torch.Generator().manual_seed(0)
    depths = set()
    for _ in range(40):
        arcs = ArcSampler(config, plan, 0.0, rule, generator, 2)(0, torch.randn(2, 32, 15), 32)
        assert arcs.shape == (1, 32, 15)
        depths.add(int(arcs.sum(-1).max()))
    assert depths == {"causal": {0}, "layerwise": {1, 2, 3, 4}, "chunked": {1, 3, 7, 15}}[rule]


def test_the_rate_rises_and_falls() -> None:
    plan = schedule(steps=1000, warmup=100, peak_lr=1.0, final_lr=0.1)
    rates = [plan.lr(step) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(1.0)
    assert rates[1000] == pytest.approx(0.1)
    assert rates[100:] == sorted(rates[100:], reverse=True)


def test_the_average_of_weights() -> None:
    model = Transducer(small_config(layers=1))
    shadow = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    average(shadow, model, 0.75)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(shadow[name], value * 0.25)


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    """The training script as a module."""
    before, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(RECIPE))
    try:
        import train  # type: ignore[import-not-found, unused-ignore]

        yield train
    finally:
        sys.path[:] = before
        for name in set(sys.modules) - known:
            if str(RECIPE) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


def test_every_rule_starts_from_the_common_checkpoint(recipe: ModuleType, tmp_path: Path) -> None:
    common = wild(small_config(right=7), seed=1)
    path = tmp_path / "common.pt"
    torch.save({"weights": common.state_dict()}, path)
    given = common.state_dict()
    for rule, right in (("adaptive", 4), ("causal", 0), ("layerwise", 2), ("chunked", 7)):
        config = small_config(rule=rule, right=right)
        model = Transducer(config)
        recipe.start_from(model, path)
        for name, value in model.state_dict().items():
            wanted = given[name]
            if name.endswith("relative"):
                wanted = wanted[:, : config.left + 1 + right]
            elif ".scheduler.out." in name:
                wanted = wanted[:right]
            torch.testing.assert_close(value, wanted)


def test_a_checkpoint_of_another_size_is_refused(recipe: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "common.pt"
    torch.save({"weights": wild(small_config(dim=16)).state_dict()}, path)
    with pytest.raises(ValueError, match="expected"):
        recipe.start_from(Transducer(small_config()), path)
    torch.save({"weights": wild(small_config(layers=4)).state_dict()}, path)
    with pytest.raises(ValueError, match="unexpected weight"):
        recipe.start_from(Transducer(small_config()), path)
