"""Work that runs beside the page: a tool in a thread of its own, with how far it is, and an end on request.

A tool says how far it is by a callback; cancelling makes that callback raise `Cancelled`, so that the tool ends as it
does for any error and leaves nothing half-written. One job of a kind runs at a time, others wait. Knows no page.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from nerine.errors import OptionError

__all__ = ["Cancelled", "Job", "Jobs", "State"]

log = logging.getLogger("nerine")
PATIENCE = 0.1  # seconds between looks of a job that waits
FAREWELL = 20.0  # seconds that jobs have to end when the server does


class Cancelled(Exception):
    """Raised in a tool, from its own progress callback, when nobody wants its result any more."""


@dataclass(frozen=True)
class State:
    """How far a job is. `shown` is what it has to show so far, as markup."""

    done: int = 0
    total: int = 0
    what: str = ""
    shown: str = ""
    waits: bool = False


class Job:
    """One piece of work. `work` is called with the job, in a thread, and gives the markup of its result."""

    def __init__(self, work: Callable[[Job], str], turn: threading.Lock) -> None:
        self._work, self._turn = work, turn
        self._cancelled, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="nerine-job", daemon=True)
        self.state = State()
        self.result = ""
        self.error: Exception | None = None

    # -- from within the work ------------------------------------------------------------------------------------------
    def progress(self, done: int, total: int, what: str = "") -> None:
        """The callback for a tool.

        Raises:
            Cancelled: the job was cancelled.
        """
        if self._cancelled.is_set():
            raise Cancelled
        self.state = replace(self.state, done=done, total=total, what=what, waits=False)

    def show(self, markup: str) -> None:
        """Something to look at before the end."""
        self.state = replace(self.state, shown=markup)

    def is_stopped(self) -> bool:
        """Whether the work is to end early and give what it has."""
        return self._stopped.is_set()

    # -- from outside --------------------------------------------------------------------------------------------------
    def start(self) -> None:
        self._thread.start()

    def cancel(self) -> None:
        """Ask it to end without a result; one that has ended stays as it is."""
        self._cancelled.set()

    def stop(self) -> None:
        """Ask it to end early, with the result that it has by then."""
        self._stopped.set()

    def join(self, seconds: float | None = None) -> bool:
        """Wait for the end; whether it came."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    @property
    def was_cancelled(self) -> bool:
        return isinstance(self.error, Cancelled)

    def _run(self) -> None:
        try:
            self.state = replace(self.state, waits=True)
            while not self._turn.acquire(timeout=PATIENCE):
                if self._cancelled.is_set():
                    raise Cancelled
            try:
                self.progress(0, 0)
                self.result = self._work(self)
            finally:
                self._turn.release()
        except Exception as error:  # whatever it is: the page shows it, and the server goes on
            self.error = error
            log.debug("a job of the web app ended with an error", exc_info=error)


class Jobs:
    """The jobs of one server, by the session (a page that is open) and the kind of work."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: dict[str, threading.Lock] = {}
        self._jobs: dict[tuple[str, str], Job] = {}
        self._closed = False

    def start(self, session: str, kind: str, work: Callable[[Job], str]) -> Job:
        """A new job.

        Raises:
            OptionError: this page has one of this kind already, or the server is ending.
        """
        with self._lock:
            if self._closed:
                raise OptionError("the server is ending; start it again")
            self._jobs = {key: job for key, job in self._jobs.items() if job.is_running}
            if (session, kind) in self._jobs:
                raise OptionError("this is running already; wait for it, or cancel it")
            job = Job(work, self._turns.setdefault(kind, threading.Lock()))
            self._jobs[session, kind] = job
            job.start()
            return job

    def of(self, session: str, kind: str) -> Job | None:
        """The latest job of that page and kind."""
        with self._lock:
            return self._jobs.get((session, kind))

    def leave(self, session: str) -> None:
        """Cancel whatever a page that was closed had running."""
        with self._lock:
            for (owner, _), job in self._jobs.items():
                if owner == session:
                    job.cancel()

    def close(self) -> None:
        """Cancel everything, and wait for it."""
        with self._lock:
            self._closed, jobs = True, list(self._jobs.values())
        for job in jobs:
            job.cancel()
        for job in jobs:
            if not job.join(FAREWELL):
                log.warning("a job of the web app did not end within %.0f s", FAREWELL)
