"""Run functions at the same time, each in a thread of its own."""

import threading
from collections.abc import Callable

LIMIT = 60  # seconds that a thread may take


def together(*functions: Callable[[], object]) -> list:
    """Return what each function returned or raised; AssertionError if one takes more than LIMIT."""
    results, ready = [None] * len(functions), threading.Barrier(len(functions))

    def call(n: int) -> None:
        ready.wait()
        try:
            results[n] = functions[n]()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            results[n] = error

    threads = [threading.Thread(target=call, args=(n,), daemon=True) for n in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive(), "a thread is stuck"
    return results
