"""Let one thread at a time, and one sequence at a time, use a model.

A public method takes a turn. A generator takes one when its first token is requested and continues in it, holding no
lock between two tokens. Once another use takes a turn, the generator's sequence is gone, and its next token raises.
"""

import functools
import threading
from collections.abc import Callable

from system.errors import GenerationOvertaken, ModelInUse

# Held while a kernel of any model is compiled and launched: neither Triton nor its interpreter is thread-safe.
LAUNCHING = threading.RLock()


class _ThisThread(threading.local):
    uses_a_model = False


_this_thread = _ThisThread()


class Turns:
    """Counts the turns of one model, and has the lock that `exclusive` holds."""

    def __init__(self):
        self.lock = threading.RLock()
        self._turn = 0

    def take(self) -> int:
        """Return the number of a new turn, which ends the one before."""
        self._turn += 1
        return self._turn

    def check(self, turn: int) -> None:
        """Raise GenerationOvertaken unless this is the turn that was taken last."""
        if turn != self._turn:
            raise GenerationOvertaken(
                "another use of this model has overtaken the generation: call generate() again, or use a model for each"
            )


def exclusive(method: Callable) -> Callable:
    """Decorate a method of an object with `turns` so that other threads wait until it returns.

    A thread uses one model at a time, so that no threads wait for each other in a circle. The method raises ModelInUse
    if its thread is already using a model, as a signal handler's call can find.
    """

    @functools.wraps(method)
    def wrapper(self, *args, **options):
        if _this_thread.uses_a_model:
            raise ModelInUse("a signal handler or callback uses a model while its thread is using one")
        with self.turns.lock:
            try:
                _this_thread.uses_a_model = True
                return method(self, *args, **options)
            finally:
                _this_thread.uses_a_model = False

    return wrapper
