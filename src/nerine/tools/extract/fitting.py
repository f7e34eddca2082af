"""One layer of two checkpoints after the other: what has changed, which adapter it gets, and how well that does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from nerine.algorithms import Algorithm, DoRA, Full, LoKr, LoRA, Norm, Params
from nerine.errors import FormatError
from nerine.files.checkpoint import Layer, Record
from nerine.ops.low_rank_fit import leading_until, spectrum, within
from nerine.ops.precision import full_precision
from nerine.tools.extract.choice import Choice
from nerine.tools.extract.noise import differs, square, threshold_of
from nerine.tools.extract.options import Case, Catalogue, catalogue, error_of, rounded
from nerine.tools.extract.pairs import Pair
from nerine.tools.extract.plan import Plan
from nerine.tools.extract.ranks import Wanted
from nerine.tools.extract.report import Extracted
from nerine.tools.extract.sheet import Sheet, sketched
from nerine.tools.extract.spending import spend
from nerine.tools.progress import Progress
from nerine.tools.shelf import Shelf

__all__ = ["LEAST", "Fitter", "Tally"]

LEAST = 1e-24  # what a square is divided by at least


@dataclass
class Tally:
    """Sums over the layers that differ, in squares; and what was left out."""

    change: float = 0.0
    weight: float = 0.0
    error: float = 0.0
    identical: int = 0
    small: int = 0
    biases: int = 0
    bias_change: float = 0.0
    bias_size: float = 0.0
    left: dict[str, str] = field(default_factory=dict)
    formats: set[tuple[torch.dtype, torch.dtype]] = field(default_factory=set)

    @property
    def threshold(self) -> str:
        return threshold_of(self.formats)


@dataclass
class Seen:
    """A layer as it was and as it is: `change` is None where the weight is the same, `shift` where the bias is."""

    weight: Tensor
    target: Tensor
    change: Tensor | None
    shift: Tensor | None
    bias_size: float

    @cached_property
    def size(self) -> float:
        """|D|²."""
        return 0.0 if self.change is None else square(self.change)

    @cached_property
    def relative(self) -> float:
        """|D|/|W|; a large number where the weight is zero."""
        return math.sqrt(self.size / max(square(self.weight), LEAST))


def seen(pair: Pair, device: str | torch.device) -> Seen:
    """Both weights of a layer, and what has changed.

    Raises:
        FormatError: one of them is not finite.
    """
    weight, target = pair.weight(device), pair.target(device)
    change = target - weight if differs(weight, target, pair.formats) else None
    bias, shift = pair.base.bias(pair.path), pair.shift(device)
    moved = shift is not None and bias is not None and differs(bias.to(shift), bias.to(shift) + shift, pair.formats)
    return Seen(weight, target, change, shift if moved else None, 0.0 if bias is None else square(bias))


@dataclass
class Fitter:
    """Extracts the chosen layers to a shelf."""

    choice: Choice
    plan: Plan
    sheet: Sheet
    shelf: Shelf
    min_change: float
    device: str | torch.device
    progress: Progress
    tally: Tally = field(default_factory=Tally)
    rows: list[Extracted] = field(default_factory=list)
    layers: dict[str, Layer] = field(default_factory=dict)
    done: int = 0

    @cached_property
    def stems(self) -> Mapping[str, str]:
        return self.sheet.stems(self.choice.weights)

    def run(self) -> None:
        """All layers, in two passes over the files where a size is to be kept."""
        self._check_dialect()
        for path in self.choice.norms:
            self._tell(path)
            self._norm(path)
        if self.plan.is_sized:
            self._run_sized()
        else:
            for path in self.choice.weights:
                self._tell(path)
                found = self._counted(path)
                if found is not None:
                    self._fit(path, found, self._algorithm(path, found))
        order = {path: i for i, path in enumerate(self.choice.algorithms)}
        self.layers = dict(sorted(self.layers.items(), key=lambda item: order[item[0]]))
        self.rows.sort(key=lambda row: order[row.layer])

    def _run_sized(self) -> None:
        """What there is to choose from, the choice, and the adapters."""
        catalogues: dict[str, Catalogue] = {}
        for path in self.choice.weights:
            self._tell(path)
            found = self._counted(path)
            if found is not None:
                catalogues[path] = self._options(path, found)
        assert self.plan.wanted is not None
        picked = spend(catalogues, self.choice, self.sheet, self.layers, int(self.plan.wanted.value))
        for path, own in catalogues.items():
            self._tell(path)
            option, algorithm = own.options[picked[path]], own.algorithm(picked[path])
            found = seen(self.choice.pairs[path], self.device)
            if algorithm is not None:
                self._fit(path, found, algorithm, option.error)
                continue
            self.tally.left[path] = "worth less than its bytes"
            self.tally.error += found.size
            if found.shift is not None:
                self._count_bias(found)

    def _options(self, path: str, found: Seen) -> Catalogue:
        assert found.change is not None
        assert self.plan.wanted is not None
        site, stem = self.choice.pairs[path].site, self.stems.get(path)
        price = self.sheet.price(path, stem)
        case = Case(site, found.weight, found.change, price, found.shift is not None)

        def refused(algorithm: Algorithm) -> bool:
            return self.sheet.refuses(algorithm, site, stem is not None)

        return catalogue(case, self.plan, int(self.plan.wanted.value), refused)

    def _tell(self, path: str) -> None:
        passes = 1 + self.plan.is_sized
        self.progress(self.done, passes * len(self.choice.weights) + len(self.choice.norms), path)
        self.done += 1

    def _check_dialect(self) -> None:
        """Whether the dialect can hold what is asked for, before any work is done.

        Raises:
            FormatError: it cannot.
        """
        if self.plan.is_sized:
            return
        pairs, sheet = self.choice.pairs, self.sheet
        own = {
            path: self.plan.sketch(self.choice.algorithms[path], pairs[path].site, path in self.stems)
            for path in self.choice.weights
        }
        try:
            sheet.lay_out({path: sketched(own[path], pairs[path].site, sheet.dtype) for path in own})
        except FormatError as error:
            strange = [path for path in own if path not in self.stems and not isinstance(own[path], LoRA | Full)]
            if not strange:
                raise
            raise FormatError(
                f"{strange[0]}: the {sheet.dialect.name} dialect has this layer in other pieces, for which "
                f"{own[strange[0]]} cannot be taken apart or put together ({error}); extract lora or full, or choose a "
                "dialect with the names of the model, such as lycoris"
            ) from error

    # -- one layer -----------------------------------------------------------------------------------------------------
    def _counted(self, path: str) -> Seen | None:
        """A layer that differs and is to have an adapter; the others are only counted."""
        pair, tally = self.choice.pairs[path], self.tally
        found = seen(pair, self.device)
        tally.formats.add(pair.formats)
        if found.change is None:
            tally.identical += 1
            self._leave_bias(path, found)
            return None
        tally.change += found.size
        tally.weight += square(found.weight)
        if found.relative <= self.min_change:
            tally.small += 1
            tally.error += found.size
            self._leave_bias(path, found)
            return None
        return found

    def _leave_bias(self, path: str, found: Seen) -> None:
        """A bias that has moved where no weight has: an adapter of its own with the norms, or only counted."""
        if found.shift is None:
            return
        has_place = path in self.stems or isinstance(self.choice.algorithms[path], Full)
        if has_place and (self.choice.train_norm or isinstance(self.choice.algorithms[path], Full)):
            site = self.choice.pairs[path].site
            self._put(path, Record(Full(), site, Params({"diff_b": found.shift})), found, 0.0)
        else:
            self._count_bias(found)

    def _count_bias(self, found: Seen) -> None:
        self.tally.biases += 1
        self.tally.bias_change += square(found.shift) if found.shift is not None else 0.0
        self.tally.bias_size += found.bias_size

    def _algorithm(self, path: str, found: Seen) -> Algorithm:
        own, site, plan = self.choice.algorithms[path], self.choice.pairs[path].site, self.plan
        assert found.change is not None
        flat = found.change.flatten(1)
        if plan.wanted is not None and plan.wanted.kind == "energy":  # no need to know all of the singular values
            rank = leading_until(flat, within(math.sqrt(1 - plan.wanted.value))).rank
            plan = replace(plan, wanted=Wanted("rank", max(rank, 1)))
        return plan.algorithm(own, site, spectrum(flat) if plan.needs_values else None, path in self.stems)

    def _fit(self, path: str, found: Seen, algorithm: Algorithm, planned: float | None = None) -> None:
        """The adapter of a layer, put on the shelf and measured as it will be written."""
        site = self.choice.pairs[path].site
        assert found.change is not None
        if isinstance(algorithm, Full):
            tensors = {"diff": found.change}
            if found.shift is not None:
                tensors["diff_b"] = found.shift
            algorithm, params = replace(algorithm, bias=found.shift is not None), Params(tensors)
        else:
            with torch.no_grad(), full_precision(found.weight):
                params = algorithm.for_file(algorithm.fit(site, found.weight, found.target), found.weight)
            if found.shift is not None:
                self._count_bias(found)
        error = error_of(algorithm, rounded(params, self.sheet.dtype), found.weight, found.change)
        self.tally.error += error
        self._put(path, Record(algorithm, site, params), found, error, planned)

    def _put(self, path: str, record: Record, found: Seen, error: float, planned: float | None = None) -> None:
        layer = self.shelf.layer(path, record, self.sheet.dtype, self.sheet.base.base(path))
        self.layers[path] = layer
        size = max(found.size, LEAST)
        self.rows.append(
            Extracted(
                path,
                str(record.algorithm),
                record.algorithm.settings(),
                tuple(record.site.shape),
                _rank(record.algorithm),
                sum(math.prod(layer.shapes[name]) * layer.dtypes[name].itemsize for name in layer.shapes),
                math.sqrt(found.size),
                found.relative,
                math.sqrt(error / size),
                None if planned is None else math.sqrt(planned / size),
            )
        )

    def _norm(self, path: str) -> None:
        """A normalisation layer: the changes of its scale and offset, as they are."""
        found = seen(self.choice.pairs[path], self.device)
        if found.change is None and found.shift is None:
            self.tally.identical += 1
            return
        change = torch.zeros_like(found.weight) if found.change is None else found.change
        tensors = {"diff": change, **({} if found.shift is None else {"diff_b": found.shift})}
        params = Params(tensors)
        algorithm = Norm(bias=found.shift is not None)
        error = error_of(algorithm, rounded(params, self.sheet.dtype), found.weight, change)
        self.tally.change += found.size
        self.tally.weight += square(found.weight)
        self.tally.error += error
        self._put(path, Record(algorithm, self.choice.pairs[path].site, params), found, error)


def _rank(algorithm: Algorithm) -> int | None:
    inner = algorithm.inner if isinstance(algorithm, DoRA) else algorithm
    found = getattr(inner, "rank", None)
    return None if isinstance(inner, LoKr) and inner.full_matrix else found
