"""A KV cache as if many tokens had been fed, without feeding them."""

import torch


def fill_cache(k_cache: torch.Tensor, v_cache: torch.Tensor, n_positions: int, seed: int) -> None:
    """Random keys and values of order 1 at the first n_positions of [layers, kv heads, context, head_dim].

    They depend on the seed, on n_positions and on the kind of device, but not on how long the cache is.
    """
    generator = torch.Generator(k_cache.device).manual_seed(seed)
    for keys, values in zip(k_cache, v_cache):
        for cache in (keys, values):
            shape = (cache.shape[0], n_positions, cache.shape[2])
            cache[:, :n_positions] = torch.randn(shape, generator=generator, dtype=cache.dtype, device=cache.device)
