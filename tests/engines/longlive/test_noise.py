"""Noise by counter, and the schedule."""

from __future__ import annotations

import numpy as np
import pytest

from realtide.engines.longlive import noise, schedule


def test_noise_depends_on_where_it_is_used_and_on_nothing_else() -> None:
    shape = (4, 3, 5)
    want = noise.frames(7, 3, 4, 2, shape)
    np.testing.assert_array_equal(noise.frames(7, 5, 2, 2, shape), want[2:])
    others = [noise.normal(8, 3, 2, shape), noise.normal(7, 4, 2, shape), noise.normal(7, 3, 1, shape)]
    for other in others:
        assert not np.intersect1d(other, want[0]).size
    assert want.dtype == np.float32


KNOWN = [-0.1142502948641777, -0.3522101044654846, -1.3114291429519653, -0.40169477462768555]


def test_noise_is_the_same_on_every_machine_and_for_good() -> None:
    """Checkpoints that wait for a resume depend on these numbers."""
    have = noise.normal(1, 2, 3, (4,))
    np.testing.assert_allclose(have, KNOWN, rtol=1e-6)


def test_noise_is_normal() -> None:
    values = noise.normal(0, 0, 0, (200_001,)).astype(np.float64)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert abs((values**4).mean() - 3) < 0.1
    assert abs((values[:-1:2] * values[1::2]).mean()) < 0.01  # the two of a pair
    assert np.isfinite(values).all()


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_seeds_are_64_bits(seed: int) -> None:
    with pytest.raises(ValueError, match="seed must be"):
        noise.normal(seed, 0, 0, (1,))
    assert noise.normal((1 << 64) - 1, 0, 0, (1,)).shape == (1,)


def test_the_few_steps_are_warped() -> None:
    steps = schedule.warped((1000, 750, 500, 250), 5.0)
    np.testing.assert_allclose(steps, [1000, 937.5, 1000 / 1.2, 625])
    np.testing.assert_allclose(schedule.warped((1000, 500), 1.0), [1000, 500])


def test_a_flow_leads_back_to_the_clean_latents() -> None:
    rng = np.random.default_rng(0)
    clean, fresh = rng.standard_normal((2, 3, 4)).astype(np.float32)
    for timestep in (1000.0, 937.5, 1.0):
        noisy = schedule.noised(clean, fresh, timestep)
        np.testing.assert_allclose(schedule.clean(noisy, fresh - clean, timestep), clean, atol=1e-6)
    np.testing.assert_array_equal(schedule.noised(clean, fresh, 1000.0), fresh)
