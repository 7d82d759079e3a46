"""Who gets the processors first, on a machine that computes and answers: the event loops, then forecasts, then loading.

Ray's own workers are at niceness 15 of at most 19. On Linux each thread has its own; elsewhere it is the whole
process's, whose event loop has to answer at once, and nothing is changed.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

FORECASTS = 2
"""Two thirds of the processor time of those beside it that want it too, and all that they leave."""
LOADING = 4
"""Under FORECASTS: with a replica that starts at the level of one that computes, a rolling update under load let the
queues grow until requests were refused."""


AT_ONCE = 4
"""Models that are loaded at the same time."""


class LoadingThreads(Executor):
    """Threads at the priority LOADING, each for one call.

    OpenMP keeps a pool of threads for every thread that has computed, and while all of them together have more threads
    than there are processors it lets none wait at the ready: with threads that stayed after a load, forecasts on two
    processors took twice as long.
    """

    def __init__(self) -> None:
        self._places = threading.Semaphore(AT_ONCE)

    def submit(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        def run() -> T:
            lower_by(LOADING)
            with self._places:
                return call(*args, **kwargs)

        thread = ThreadPoolExecutor(1, thread_name_prefix="load")
        future = thread.submit(run)
        thread.shutdown(wait=False)
        return future


def lower_by(levels: int) -> None:
    """Makes the calling thread, and those that it starts, wait for others. There is no way back."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + levels)
