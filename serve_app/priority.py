"""Who gets the processors first, on a machine that computes and answers: the event loops, then forecasts, then loading.

Ray's own workers are at niceness 15 of at most 19. On Linux each thread has its own; elsewhere it is the whole
process's, whose event loop has to answer at once, and nothing is changed.
"""

from __future__ import annotations

import os
import sys
import threading

FORECASTS = 2
"""Two thirds of the processor time of those beside it that want it too, and all that they leave."""
LOADING = 4
"""Under FORECASTS: with a replica that starts at the level of one that computes, a rolling update under load let the
queues grow until requests were refused."""


def lower_by(levels: int) -> None:
    """Makes the calling thread, and those that it starts, wait for others. There is no way back."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + levels)
