"""How the next token is chosen from its logits."""

import dataclasses
import hashlib
import secrets

import torch

from system.errors import InputError

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 100.0  # below it, or at 0, the largest logit wins anyhow
SEEDS = range(-(2**63), 2**63)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Draw a token from softmax(logits / temperature), after leaving out unlikely ones if asked to.

    The kernel draws by itself (common/sampling.py) unless tokens are left out: then the logits are copied and sorted by
    PyTorch for every token.
    """

    temperature: float = 0.0  # 0: the largest logit
    seed: int = 0  # equal seeds give equal tokens
    top_k: int = 0  # keep so many of the likeliest tokens; 0: all
    top_p: float = 1.0  # then keep the fewest of the likeliest whose probabilities add up to so much
    min_p: float = 0.0  # then keep those with at least so much of the likeliest one's probability

    def __post_init__(self):
        """Raise InputError, naming the field, if a value is out of range."""
        checks = {
            "temperature": self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE,
            "seed": self.seed in SEEDS,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
        }
        allowed = {
            "temperature": f"0, or {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}",
            "seed": "an integer of 64 bits",
            "top_k": "0 or more",
            "top_p": "above 0, and at most 1",
            "min_p": "0 to 1",
        }
        for name, is_good in checks.items():
            if not is_good:
                raise InputError(f"{name} {getattr(self, name)}: it must be {allowed[name]}")

    @property
    def leaves_out(self) -> bool:
        """Whether tokens may be left out, so that PyTorch must choose."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def in_kernel(self) -> tuple[float, int]:
        """The kernel's (1 / temperature or 0, seed)."""
        if self.temperature == 0 or self.leaves_out:
            return 0.0, 0
        return 1 / self.temperature, self.seed

    def likeliest(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ids that are not left out, the likeliest first, and their probabilities, which add up to 1.

        logits: float32 [vocab]. Like transformers' logits processors, the cuts are made one after another.
        """
        sorted_logits, ids = torch.sort(logits / self.temperature, descending=True, stable=True)
        if self.top_k:
            sorted_logits = sorted_logits[: self.top_k]
        probabilities = torch.softmax(sorted_logits, 0)
        before = probabilities.cumsum(0) - probabilities
        kept = (before < self.top_p) & (probabilities >= self.min_p * probabilities[0])
        kept[0] = True
        probabilities = probabilities[kept]
        return ids[: len(kept)][kept], probabilities / probabilities.sum()

    def choose(self, logits: torch.Tensor, position: int) -> int:
        """Return a token drawn from `likeliest`, which depends on logits, seed and position alone."""
        ids, probabilities = self.likeliest(logits)
        digest = hashlib.blake2b(f"{self.seed} {position}".encode(), digest_size=4).digest()  # torch uses 32 bits
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return int(ids[torch.multinomial(probabilities.double().cpu(), 1, generator=generator)])


GREEDY = Sampling()


def new_seed() -> int:
    """Return a seed that nobody can guess, of 32 bits, so that it is short to type."""
    return secrets.randbits(32)
