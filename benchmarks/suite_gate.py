"""A short race of a few rows against recorded ratios: whether the library became slower. `suite.py --gate` runs it.

Only nerine and the frozen layer take part. A row fails where its ratio is `SLACK` worse than the recorded one, by its
best and by its median, and again with more rounds: the machines that this runs on have other work as well. That is also
why it runs on one thread: two that wait for each other are slowed down by others far more than the frozen layer is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from step_contestants import adapted, frozen
from step_measure import Contestant, best_ratio, median_ratio, race
from step_rows import ROWS, problem
from suite_tables import cpu_model, header

__all__ = ["GATE", "gate", "race_of", "record", "worse"]

GATE = Path(__file__).parent / "results" / "gate.json"
LAYERS = ("linear-1280", "conv-320")
NAMES = ("LoRA", "DoRA(LoRA)", "LoKr", "Diag-OFT", "LoHa")
SLACK = 1.25
ROUNDS, MORE = 12, 30

Ratios = dict[str, dict[str, float]]  # by layer and row
Race = Callable[[str, tuple[str, ...], int], dict[str, float]]


def race_of(layer: str, rows: tuple[str, ...], rounds: int) -> dict[str, float]:
    """The lower of best over best and the median, for each row: what is slower in truth is so in both."""
    p = problem(layer)
    groups: dict[str, list[Contestant]] = {row: [frozen(p), adapted(p, ROWS[row])] for row in rows}
    times = race(p, groups, rounds, warm_up=2)
    found = {}
    for row, each in times.items():
        own, plain = each["nerine"].total, each["frozen"].total
        found[row] = min(best_ratio(own, plain), median_ratio(own, plain))
    return found


def worse(recorded: Mapping[str, float], found: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Rows whose ratio is too much over the recorded one, with both; a row that is not recorded is an error."""
    return {row: (recorded[row], ratio) for row, ratio in found.items() if ratio > recorded[row] * SLACK}


def gate(recorded: Mapping[str, Mapping[str, float]], run: Race = race_of, say: Callable[[str], None] = print) -> bool:
    """Whether all rows are as fast as recorded; what is not is raced once more, by itself, and then said."""
    passed = True
    for layer in LAYERS:
        found = run(layer, NAMES, ROUNDS)
        for row, ratio in found.items():
            say(f"{layer}, {row}: {ratio:.2f}, recorded {recorded[layer][row]:.2f}")
        doubtful = worse(recorded[layer], found)
        if not doubtful:
            continue
        say(f"{layer}: once more with {MORE} rounds: {', '.join(doubtful)}")
        again = run(layer, tuple(doubtful), MORE)
        for row, (was, now) in worse(recorded[layer], again).items():
            passed = False
            say(
                f"{layer}, {row}: {now:.2f} of the frozen layer, recorded {was:.2f}: "
                f"{now / was - 1:.0%} worse, allowed are {SLACK - 1:.0%}"
            )
    return passed


def record(run: Race = race_of, file: Path = GATE) -> Ratios:
    """Measure and write what later runs are compared with."""
    ratios = {layer: run(layer, NAMES, MORE) for layer in LAYERS}
    file.write_text(json.dumps({"header": header(), "ratios": ratios}, indent=1) + "\n", encoding="utf-8")
    return ratios


def main(recording: bool) -> int:
    """Exit status: 1 where a row fails."""
    torch.set_num_threads(1)
    if recording:
        for layer, rows in record().items():
            print(f"{layer}: {', '.join(f'{row} {ratio:.2f}' for row, ratio in rows.items())}")
        return 0
    known = json.loads(GATE.read_text(encoding="utf-8"))
    if known["header"]["cpu"] != cpu_model():
        print(f"recorded on another machine ({known['header']['cpu']}); `suite.py --gate --record` records this one")
    return 0 if gate(known["ratios"]) else 1
