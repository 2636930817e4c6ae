"""Who may use a model now: one thread at a time, and one sequence at a time.

A public method takes a turn. A generator takes one when its first token is asked for and goes on in it, holding nothing
between two tokens; once another use has taken a turn, the sequence that it was decoding is gone, and it raises.
"""

import functools
import threading
from collections.abc import Callable

from system.errors import GenerationOvertaken, ModelInUse

# Held while kernels are compiled and launched, whatever the model: neither Triton nor its interpreter is made for
# several threads at once.
LAUNCHING = threading.RLock()


class _ThisThread(threading.local):
    uses_a_model = False


_this_thread = _ThisThread()


class Turns:
    """Counts the turns of one model; see exclusive."""

    def __init__(self):
        self.lock = threading.RLock()
        self._turn = 0

    def take(self) -> int:
        """A new turn, which ends the one before."""
        self._turn += 1
        return self._turn

    def check(self, turn: int) -> None:
        """GenerationOvertaken unless this is the turn that was taken last."""
        if turn != self._turn:
            raise GenerationOvertaken(
                "another use of this model has overtaken the generation: call generate() again, or use a model for each"
            )


def exclusive(method: Callable) -> Callable:
    """A method of what has `turns`: other threads wait until it is over.

    A thread uses one model at a time, so that none waits for another in a circle. ModelInUse if it is amid a use
    already, as a signal handler's call can be.
    """

    @functools.wraps(method)
    def wrapper(self, *args, **options):
        if _this_thread.uses_a_model:
            raise ModelInUse("a signal handler or callback uses a model while its thread is amid the use of one")
        with self.turns.lock:
            try:
                _this_thread.uses_a_model = True
                return method(self, *args, **options)
            finally:
                _this_thread.uses_a_model = False

    return wrapper
