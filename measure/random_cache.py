"""Fill a KV cache as if many tokens had been fed, without feeding them."""

import torch


def fill_cache(k_cache: torch.Tensor, v_cache: torch.Tensor, n_positions: int, seed: int) -> None:
    """Write normal random keys and values at the first n_positions of caches [layers, kv heads, context, head_dim].

    They depend on the seed, on n_positions and on the type of device, but not on the length of the cache.
    """
    generator = torch.Generator(k_cache.device).manual_seed(seed)
    for keys, values in zip(k_cache, v_cache):
        for cache in (keys, values):
            shape = (cache.shape[0], n_positions, cache.shape[2])
            cache[:, :n_positions] = torch.randn(shape, generator=generator, dtype=cache.dtype, device=cache.device)
