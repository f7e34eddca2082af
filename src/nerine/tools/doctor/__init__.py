"""The examination of an installation: what is here, what is missing for what, and whether the promise holds on it.

Each part is a file beside this; they look and report, and nothing prints.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from nerine.tools.doctor.machine import devices, disks, environment, extras, findings, system, versions
from nerine.tools.doctor.promise import LIMIT, checks
from nerine.tools.doctor.report import Check, DoctorReport, Extra, Finding

__all__ = ["Check", "DoctorReport", "Extra", "Finding", "examine"]


def examine(self_test: bool = True) -> DoctorReport:
    """Look at everything; with `self_test` the promise is tried on every device that there is."""
    here = devices()
    began = time.monotonic()
    tried = list(checks(list(here))) if self_test else []
    seconds = time.monotonic() - began
    return DoctorReport(
        facts={
            "Versions": versions(),
            "Machine": system(),
            "Devices": here,
            "Disk": disks(),
            "Environment": environment(),
        },
        extras=extras(),
        checks=tried,
        seconds=seconds,
        findings=(*findings(), *_broken(tried)),
    )


def _broken(tried: Iterable[Check]) -> list[Finding]:
    """A finding for every check that does not hold."""
    return [
        Finding(
            f"{one.algorithm} on {one.device}: "
            + (one.error or f"differs by {max(one.reloaded, one.merged):.1e}, more than {LIMIT:.0e}"),
            True,
        )
        for one in tried
        if not one.holds
    ]
