"""Names of the phases of a launch and of the barriers between them.

In a launch that gives a token, barrier i + 1 follows phase i (0, 1, ...). No barrier follows the last phase.
"""

from typing import NamedTuple

from common.barrier import LAYER_BARRIERS

PHASES = ("QKV", "attention", "O projection", "router", "gate-up", "down")  # of a layer; each ends with a barrier
assert len(PHASES) == LAYER_BARRIERS.value
PHASE_NAMES = ("embedding", *PHASES, "LM head", "argmax")


class Phase(NamedTuple):
    """One phase of a launch; `layer` is None before the first layer and after the last."""

    name: str
    layer: int | None


def phases_of_token(n_layers: int) -> list[Phase]:
    """Return all phases of a launch that gives a token, in order."""
    layers = [Phase(name, layer) for layer in range(n_layers) for name in PHASES]
    return [Phase("embedding", None), *layers, Phase("LM head", None), Phase("argmax", None)]


def barrier_name(barrier: int, n_layers: int) -> str:
    """Return the name of the phase before barrier number 1, 2, ... of a launch."""
    layer, phase = divmod(barrier - 2, len(PHASES))
    if barrier == 1:
        return "the embedding"
    return f"the {PHASES[phase]} phase of layer {layer}" if layer < n_layers else "the LM head"
