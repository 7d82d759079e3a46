"""What a test of priorities asks."""

import os
import sys
import threading


def niceness():
    """Of the thread that asks; elsewhere than on Linux, of its process."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id() if sys.platform == "linux" else 0)
