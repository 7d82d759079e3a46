"""The cluster's resources, asked for once a second by a thread of the ingress, so that no request waits for Ray."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from serve_app.logs import log

REFRESH_S = 1.0


class ClusterWatch:
    """`resources`: the latest totals such as {"CPU": 8.0, "GPU": 2.0}; None until the first answer."""

    def __init__(self, probe: Callable[[], Mapping[str, float] | None]) -> None:
        """probe: blocks. What it raises is logged, and the last answer stays."""
        self.resources: Mapping[str, float] | None = None
        self._probe = probe
        self._stop = threading.Event()
        threading.Thread(target=self._run, name="cluster-watch", daemon=True).start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.resources = self._probe()
            except Exception as error:  # Ray's own, of many kinds, while the head node restarts
                log(logging.WARNING, "the cluster could not be asked for its resources", error=type(error).__name__)
            self._stop.wait(REFRESH_S)

    def stop(self) -> None:
        self._stop.set()
