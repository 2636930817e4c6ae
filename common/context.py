"""What every phase of a token is given: pointers to memory, the position, and which of how many programs this is."""

from typing import Any, NamedTuple


class Context(NamedTuple):
    """A launch from the view of one of its programs."""

    w: Any  # host.weights.Weights, pointers
    s: Any  # host.state.State, pointers
    position: Any  # of the token
    max_context: Any  # positions of the cache
    n_layers: Any
    want_head: Any  # whether the LM head is wanted, 0 or 1
    program: Any
    n_programs: Any
    work: Any  # common.work.Work
    peers: Any  # common.exchange.Peers; () on a single GPU
