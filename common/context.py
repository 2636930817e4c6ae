"""What every phase of a token is given: the memory, the position, and who of how many runs it."""

from typing import Any, NamedTuple


class Context(NamedTuple):
    """A launch as one of its programs sees it."""

    w: Any  # host.weights.Weights, pointers
    s: Any  # host.state.State, pointers
    position: Any  # of the token
    max_context: Any  # positions that the cache has
    n_layers: Any
    want_head: Any  # whether the LM head is wanted, 0 or 1
    program: Any
    n_programs: Any
    work: Any  # common.work.Work
