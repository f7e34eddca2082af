"""The two tables of docs/files.md, worked out from the code: what each dialect holds, and who reads what in which.

cd tests && PYTHONPATH=. python -m files_tables    writes them into the document
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from nerine import BOFT, IA3, DiagOFT, DoRA, DyLoRA, Full, GLoRA, LoHa, LoKr, LoRA, Norm, OFTv2, TLoRA
from nerine.algorithms import Algorithm, Params
from nerine.files.checkpoint import Base, Record
from nerine.files.dialects import DIALECTS
from nerine.files.readers import READERS
from nerine.site import Site

DOCUMENT = Path(__file__).parents[1] / "docs" / "files.md"
LINEAR = Site("linear", (24, 12), has_bias=True)
CONV = Site("conv", (24, 12, 3, 3), (1, 1), (1, 1), (1, 1))
NORM = Site("norm", (24,), has_bias=True)
KINDS: Mapping[str, tuple[Algorithm, Site]] = {
    "LoRA": (LoRA(rank=2, alpha=1), LINEAR),
    "LoRA, Tucker": (LoRA(rank=2, alpha=1, tucker=True), CONV),
    "DyLoRA": (DyLoRA(rank=2, alpha=1), LINEAR),
    "T-LoRA": (TLoRA(rank=2, alpha=1), LINEAR),
    "LoHa": (LoHa(rank=2, alpha=1), LINEAR),
    "LoKr": (LoKr(rank=1, alpha=2), LINEAR),
    "LoKr, Tucker": (LoKr(rank=1, alpha=2, tucker=True), CONV),
    "GLoRA": (GLoRA(rank=2, alpha=1), LINEAR),
    "Full": (Full(), LINEAR),
    "Norm": (Norm(), NORM),
    "IA3, outputs": (IA3(), LINEAR),
    "IA3, inputs": (IA3(on_input=True), LINEAR),
    "Diag-OFT": (DiagOFT(block_size=4), LINEAR),
    "Diag-OFT, bounded": (DiagOFT(block_size=4, constraint=0.1), LINEAR),
    "Diag-OFT, rescaled": (DiagOFT(block_size=4, rescale=True), LINEAR),
    "BOFT": (BOFT(block_size=4), LINEAR),
    "OFTv2": (OFTv2(block_size=4), LINEAR),
    "DoRA of LoRA, out": (DoRA(LoRA(rank=2, alpha=1)), LINEAR),
    "DoRA of LoRA, in": (DoRA(LoRA(rank=2, alpha=1), axis="in"), LINEAR),
    "DoRA of LoKr, out": (DoRA(LoKr(rank=1, alpha=2)), LINEAR),
}


def sketch(algorithm: Algorithm, site: Site) -> Record:
    """Such an adapter on such a layer, without values."""
    design = algorithm.design(site)
    shapes = {name: torch.empty(shape, device="meta") for name, shape in design.shapes.items()}
    return Record(algorithm, site, Params(shapes, design.scale))


def base(site: Site) -> Base:
    weight = torch.empty(site.shape, device="meta")
    return Base(lambda: weight, lambda: weight.new_empty(site.shape[:1]))


def table(rows: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def held() -> str:
    """Adapters by dialects: "yes", "as LoRA" where the same function is written as one, or nothing."""
    rows = [["adapter", *DIALECTS]]
    for name, (algorithm, site) in KINDS.items():
        record, cells = sketch(algorithm, site), []
        for dialect in DIALECTS.values():
            if dialect.refuses(record):
                cells.append("")
                continue
            emitted = dialect.emit(record, base(site))
            own = {spec.key for spec in algorithm.layout_of(record.params.tensors).specs.values()}
            other = any(key.startswith(("lora_", "layer.")) for key in emitted) and not own & {"lora_down.weight"}
            other = other or ("lora_mid.weight" in own and "lora_mid.weight" not in emitted)
            cells.append("as LoRA" if other else "yes")
        rows.append([name, *cells])
    return table(rows)


def read() -> str:
    """Adapters by programs: the first dialect in which it is read exactly, or "~" and one in which nearly."""
    rows = [["adapter", *(reader.name for reader in READERS)]]
    for name, (algorithm, site) in KINDS.items():
        record, cells = sketch(algorithm, site), []
        for reader in READERS:
            able = [dialect for dialect in DIALECTS.values() if not dialect.refuses(record)]
            levels = {dialect.name: reader.judge(record, dialect).level for dialect in able}
            exact = [dialect for dialect, level in levels.items() if level == "exact"]
            near = [f"~ {dialect}" for dialect, level in levels.items() if level == "near"]
            cells.append((exact or near or [""])[0])
        rows.append([name, *cells])
    return table(rows)


def written(text: str) -> str:
    """The document with both tables as they are now."""
    for mark, made in (("held", held()), ("read", read())):
        pattern = rf"(<!-- {mark}: written by tests/files_tables.py -->\n).*?(<!-- end of {mark} -->)"
        text, count = re.subn(pattern, lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{DOCUMENT.name} has no place for the table {mark!r}")
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
