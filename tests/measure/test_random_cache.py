"""A filled cache depends on the seed and on how much is filled, not on what lies behind."""

import pytest
import torch

from measure.random_cache import fill_cache

LAYERS, HEADS, DIM = 3, 2, 16


def filled(max_context: int, n_positions: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    caches = torch.zeros(2, LAYERS, HEADS, max_context, DIM, dtype=torch.bfloat16)
    fill_cache(caches[0], caches[1], n_positions, seed)
    return caches[0], caches[1]


def test_values_are_of_order_one_and_all_different():
    caches = torch.stack(filled(200, 150)).float()
    assert caches[..., :150, :].std() == pytest.approx(1, abs=0.02)
    assert not caches[..., 150:, :].any()
    rows = caches[..., :150, :].reshape(-1, DIM)
    assert len(rows.unique(dim=0)) == len(rows)


def test_a_longer_cache_starts_with_the_same_values():
    for short, long in zip(filled(50, 40), filled(60, 40)):
        assert torch.equal(short[:, :, :40], long[:, :, :40])


def test_another_seed_gives_others():
    assert not torch.equal(filled(50, 40)[0], filled(50, 40, seed=1)[0])


def test_nothing_to_fill():
    assert not torch.stack(filled(5, 0)).any()
