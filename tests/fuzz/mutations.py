"""What can be wrong with a file, as functions of a valid one and a source of chance.

Three layers of damage: *content* (a valid container with wrong tensors, names or metadata), *header* (claims that are
not true) and *bytes*. Damage of the content comes most often, for it is what gets past the door.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

import torch

from fuzz.container import ITEM, TORCH, File, Tensor, filled, join, raw, spelled, values_of

NUMBERS = [0.0, -0.0, -1.0, 1e-30, 1e30, -1e30, 3.4e38, math.nan, math.inf, -math.inf, 1e-45, 65504.0, 2.0**63, 1e300]
NAMES = ["", "\x1b[2J\x1b[31m", "a\nb", "../../etc/passwd", "\0", "..", "ü\u202e", "x" * 5000, ".", "alpha", "\ud7ff"]
NAMES += ["lycoris_inner_lin_ear", "lycoris_.alpha", "lycoris_inner_lin_ear[0:4].alpha", "lycoris_conv[4:2].alpha"]
NAMES += ["lycoris_conv[0:99999999999999999999].alpha", "lycoris_tokens.lora_up.weight.lora_up.weight"]
SUFFIXES = ["alpha", "dora_scale", "lora_up.weight", "lora_down.weight", "lora_mid.weight", "diff", "diff_b"]
SUFFIXES += ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "oft_blocks", "rescale"]
SUFFIXES += ["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "w_norm", "b_norm"]
SUFFIXES += ["weight", "on_input", "a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight", "lambda_layer"]
SUFFIXES += ["p_layer.weight", "q_layer.weight", "base_p", "base_q", "base_lambda", "oft_R.weight", "scalar", "bias"]
WILD: list[Any] = [None, True, False, -1, 0, 1, 1.5, 2**31, 2**63, 2**64, -(2**63), 10**400, "1", "", [], {}, [[1]]]
WILD += [math.nan, math.inf, 1e400, "lora", {"algorithm": "lora"}, "\x1b[31m", "x" * 3000]


# -- content -----------------------------------------------------------------------------------------------------------
def any_key(file: File, rng: random.Random, ending: str = "") -> str | None:
    keys = [key for key in file.tensors if key.endswith(ending)] or list(file.tensors)
    return rng.choice(keys) if keys else None


def rename(file: File, rng: random.Random) -> None:
    if (key := any_key(file, rng)) is None:
        return
    stem, _, suffix = key.partition(".")
    other = (any_key(file, rng) or ".").partition(".")
    new = rng.choice(
        [
            lambda: rng.choice(NAMES),
            lambda: f"{stem}.{rng.choice(SUFFIXES)}",
            lambda: f"{other[0]}.{suffix}",
            lambda: f"{rng.choice(NAMES)}.{suffix}",
            lambda: f"{stem}{rng.choice(NAMES)}.{suffix}",
            lambda: f"{stem}.{suffix}{rng.choice(NAMES)}",
            lambda: key.upper(),
            lambda: key.replace("_", "."),
            lambda: f"{stem}[{rng.randrange(-2, 9)}:{rng.randrange(-2, 9)}].{suffix}",
        ]
    )()
    moved = file.tensors[key] if rng.random() < 0.4 else file.tensors.pop(key)
    file.tensors[new] = moved


def remove(file: File, rng: random.Random) -> None:
    if (key := any_key(file, rng)) is not None:
        del file.tensors[key]


def keep_one_layer(file: File, rng: random.Random) -> None:
    if (key := any_key(file, rng)) is not None:
        stem = key.partition(".")[0]
        file.tensors = {k: t for k, t in file.tensors.items() if k.partition(".")[0] == stem}


def add(file: File, rng: random.Random) -> None:
    stem = (any_key(file, rng) or "lycoris_conv.").partition(".")[0]
    shape = [rng.randrange(0, 9) for _ in range(rng.randrange(0, 5))]
    file.tensors[f"{stem}.{rng.choice(SUFFIXES)}"] = filled(rng.choice(list(ITEM)), shape, rng)


def wrong_alpha(file: File, rng: random.Random) -> None:
    if (key := any_key(file, rng, ".alpha")) is None:
        return
    shape = rng.choice([[], [1], [2], [0], [1, 1], [1, 0], [1] * 20, [3, 3]])
    dtype = rng.choice(list(ITEM))
    value = rng.choice(NUMBERS)
    if dtype in ("F64", "F32", "F16", "BF16") and rng.random() < 0.7:
        numbers = torch.full((math.prod(shape),), value, dtype=torch.float64).to(TORCH[dtype])
        file.tensors[key] = Tensor(dtype, shape, raw(numbers))
    else:
        file.tensors[key] = filled(dtype, shape, rng)


def reshape(file: File, rng: random.Random) -> None:
    """Another shape for the same number of bytes."""
    if (key := any_key(file, rng)) is None:
        return
    tensor = file.tensors[key]
    shape = list(tensor.shape)
    at = rng.randrange(len(shape) + 1)
    kind = rng.randrange(5)
    if kind == 0:
        shape.reverse()
    elif kind == 1:
        rng.shuffle(shape)
    elif kind == 2:
        shape[at:at] = [1] * rng.choice([1, 1, 2, 5, 30])
    elif kind == 3:
        shape = [math.prod(shape)]
    elif len(shape) > 1:
        at %= len(shape) - 1
        shape[at : at + 2] = [shape[at] * shape[at + 1]]
    tensor.shape = shape


def resize(file: File, rng: random.Random) -> None:
    """Another size of an axis, or another number of axes, with data to match."""
    if (key := any_key(file, rng)) is None:
        return
    tensor = file.tensors[key]
    shape = list(tensor.shape)
    at = rng.randrange(len(shape) + 1)
    if rng.random() < 0.3 or not shape:
        shape.insert(at, rng.choice([0, 1, 2, 3, 8]))
    elif rng.random() < 0.3:
        del shape[at % len(shape)]
    else:
        shape[at % len(shape)] = rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 100])
    if math.prod(shape) < 100_000:
        file.tensors[key] = filled(tensor.dtype, shape, rng)


def another_rank(file: File, rng: random.Random) -> None:
    """The axes of one size, in some or all tensors of a layer, get another size."""
    if (key := any_key(file, rng)) is None:
        return
    stem, old, new = key.partition(".")[0], rng.choice([1, 2, 4]), rng.choice([0, 1, 2, 3, 5, 16, 64])
    for name, tensor in file.tensors.items():
        if name.partition(".")[0] == stem and old in tensor.shape and rng.random() < 0.8:
            shape = [new if size == old else size for size in tensor.shape]
            if math.prod(shape) < 100_000:
                file.tensors[name] = filled(tensor.dtype, shape, rng)


def recast(file: File, rng: random.Random) -> None:
    """The same numbers in another format, in one tensor or in all."""
    dtype = rng.choice(list(TORCH))
    some = any_key(file, rng)
    for key, tensor in file.tensors.items():
        if (key == some or rng.random() < 0.1) and (values := values_of(tensor)) is not None:
            file.tensors[key] = Tensor(dtype, tensor.shape, raw(values.to(torch.float32).to(TORCH[dtype])))


def reinterpret(file: File, rng: random.Random) -> None:
    """The same bytes as another format of the same width."""
    if (key := any_key(file, rng)) is not None:
        tensor = file.tensors[key]
        tensor.dtype = rng.choice([name for name, size in ITEM.items() if size == ITEM[tensor.dtype]])


def poison(file: File, rng: random.Random) -> None:
    """Not-a-numbers, infinities, huge and tiny numbers."""
    if (key := any_key(file, rng)) is None:
        return
    tensor = file.tensors[key]
    values = values_of(tensor)
    if values is None or not values.is_floating_point() or values.element_size() == 1:
        return
    number = torch.tensor(rng.choice(NUMBERS), dtype=torch.float64).to(values.dtype)
    if rng.random() < 0.5:
        values[rng.randrange(len(values))] = number
    else:
        values.fill_(number)
    tensor.data = raw(values)


def no_elements(file: File, rng: random.Random) -> None:
    if (key := any_key(file, rng)) is not None:
        shape = rng.choice([[0], [0, 8], [8, 0], [0, 0], [2**40, 0], [0] * 30, [2, 0, 3, 2]])
        file.tensors[key] = Tensor(rng.choice(list(ITEM)), shape, b"")


def graft(file: File, rng: random.Random) -> None:
    """The tensors of one layer from the file of another algorithm, beside or instead of its own."""
    from fuzz.seeds import seeds

    other = File.of(seeds()[rng.choice(list(seeds()))])
    if (key := any_key(other, rng)) is None:
        return
    stem = key.partition(".")[0]
    if rng.random() < 0.7:
        file.tensors = {k: t for k, t in file.tensors.items() if k.partition(".")[0] != stem}
    file.tensors |= {k: t for k, t in other.tensors.items() if k.partition(".")[0] == stem}
    if rng.random() < 0.3:
        file.metadata = other.metadata


def wrong_metadata(file: File, rng: random.Random) -> None:
    """The settings that nerine writes: garbage, other versions, other types anywhere in the tree."""
    text = file.metadata.get("nerine", "{}")
    kind = rng.randrange(8)
    if kind == 0:
        file.metadata["nerine"] = rng.choice(["", "{", "null", "[]", "1", '"a"', "NaN", "{}", "\x1b[31m", "9" * 5000])
    elif kind == 1:
        depth = rng.choice([10, 500, 2000, 100_000])
        file.metadata["nerine"] = rng.choice(["[" * depth, '{"a":' * depth, "[" * depth + "]" * depth])
    elif kind == 2:
        at = rng.randrange(len(text) + 1)
        file.metadata["nerine"] = text[:at] + rng.choice(["", "\0", "}", "{", '"', "0"]) + text[at + rng.randrange(3) :]
    elif kind == 3:
        file.metadata = {}
    elif kind == 4:
        file.metadata |= {rng.choice(NAMES): rng.choice(NAMES) for _ in range(3)}
    elif kind == 5:
        file.metadata["nerine"] = deep_dora(text, rng.choice([2, 50, 900]))
    else:
        try:
            own = json.loads(text)
        except (ValueError, RecursionError):
            return
        change(own, rng)
        file.metadata["nerine"] = json.dumps(own)


def deep_dora(text: str, depth: int) -> str:
    """Settings of DoRA around DoRA around DoRA."""
    try:
        own = json.loads(text)
        inner = json.dumps(own["algorithms"][0])
    except (ValueError, LookupError, TypeError, RecursionError):
        return text
    own["algorithms"] = ["@"]
    return json.dumps(own).replace('"@"', '{"algorithm":"dora","inner":' * depth + inner + "}" * depth)


def change(tree: Any, rng: random.Random) -> None:
    """One place of a tree of JSON gets another value, goes, or comes twice."""
    while isinstance(tree, dict | list) and tree:
        at = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        if isinstance(tree[at], dict | list) and tree[at] and rng.random() < 0.75:
            tree = tree[at]
            continue
        action = rng.randrange(4)
        if action == 0:
            del tree[at]
        elif action == 1 and isinstance(tree, dict):
            tree[rng.choice(NAMES)] = tree.pop(at)
        elif action == 2 and isinstance(tree, dict):
            tree[rng.choice([*NAMES, "inner", "axis", "rank"])] = rng.choice(WILD)
        else:
            tree[at] = rng.choice(WILD)
        return


CONTENT: list[Callable[[File, random.Random], None]] = [
    rename,
    remove,
    keep_one_layer,
    add,
    wrong_alpha,
    reshape,
    resize,
    another_rank,
    recast,
    reinterpret,
    poison,
    no_elements,
    graft,
    wrong_metadata,
    wrong_metadata,
]


# -- header ------------------------------------------------------------------------------------------------------------
def lie(entries: list[tuple[str, Any]], rng: random.Random) -> None:
    """One claim of the header that is not true."""
    at = rng.randrange(len(entries))
    key, entry = entries[at]
    if key == "__metadata__" or not isinstance(entry, dict):
        kinds: list[Any] = [None, [], 1, "x", {"a": 1}, {"a": None}, {"a": {"b": "c"}}, {"\ud800": "a"}, {}]
        entries[at] = (key, rng.choice(kinds))
        return
    entry = json.loads(json.dumps(entry))
    kind = rng.randrange(9)
    if kind == 0:
        entry["shape"] = rng.choice([*WILD, [1] * 1000, [0] * 5, [2**32, 2**32], [2**62, 4], [2**63, 0]])
    elif kind == 1:
        axis = rng.randrange(len(entry["shape"]) + 1)
        entry["shape"][axis : axis + 1] = [rng.choice(WILD)]
    elif kind == 2:
        entry["data_offsets"] = rng.choice([*WILD, [0], [0, 0], [0, 1, 2], [2**63, 2**63 + 4], [2**64 - 4, 2**64]])
    elif kind == 3:
        entry["data_offsets"][rng.randrange(2)] = rng.choice(WILD)
    elif kind == 4:
        entry["data_offsets"] = [n + rng.choice([-8, -1, 1, 4, 2**63]) for n in entry["data_offsets"]]
    elif kind == 5:
        entry["dtype"] = rng.choice([*ITEM, "F4", "C64", "f32", "F8_E8M0", "", "\x1b[31m", None, 1, ["F32"]])
    elif kind == 6:
        del entry[rng.choice(list(entry))]
    elif kind == 7:
        entry[rng.choice([*NAMES, "strides"])] = rng.choice(WILD)
    else:
        entry = rng.choice(WILD)
    entries[at] = (key, entry)


def twice(entries: list[tuple[str, Any]], rng: random.Random) -> None:
    entries.insert(rng.randrange(len(entries) + 1), rng.choice(entries))


def swap(entries: list[tuple[str, Any]], rng: random.Random) -> None:
    """Two names change places, and so the shapes of two tensors."""
    i, j = rng.randrange(len(entries)), rng.randrange(len(entries))
    (a, x), (b, y) = entries[i], entries[j]
    entries[i], entries[j] = (a, y), (b, x)


HEADER: list[Callable[[list[tuple[str, Any]], random.Random], None]] = [lie, lie, lie, lie, twice, swap]


# -- bytes -------------------------------------------------------------------------------------------------------------
def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice([rng.randrange(len(data) + 1), rng.randrange(min(20, len(data) + 1))])]


def flip(data: bytes, rng: random.Random) -> bytes:
    """A few bits, in the header or in the data."""
    changed = bytearray(data)
    header = min(8 + int.from_bytes(data[:8], "little"), len(data))
    begin, end = rng.choice([(0, min(8, len(data))), (8, header), (header, len(data))])
    for _ in range(rng.choice([1, 1, 2, 8])):
        if begin < end:
            changed[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def another_length(data: bytes, rng: random.Random) -> bytes:
    length = rng.choice(
        [0, 1, 2, 7, len(data), max(len(data) - 8, 0), 2**20, 2**25, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]
    )
    return struct.pack("<Q", length) + data[8:]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice([1, 2, 8])) + data[at + rng.choice([0, 0, 1, 4]) :]


def other_file(data: bytes, rng: random.Random) -> bytes:
    """No safetensors file at all, or a header of brackets."""
    depth = rng.choice([5, 1000, 50_000])
    return rng.choice(
        [
            b"",
            b"PK\x03\x04" + data[:100],
            b"\x80\x02" + data,
            b"<!DOCTYPE html><html>Not found",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            join(b"{" + b'"a":[' * depth, b""),
            join(b'{"a":' * depth, b""),
            join(b'{"a":[' + b"[]," * depth + b"[]]}", b""),
            join(rng.randbytes(50), b""),
        ]
    )


BYTES = [truncate, flip, flip, another_length, insert, other_file]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A damaged copy of a valid file."""
    file = File.of(data)
    chance = rng.random()
    if chance < 0.9:
        for _ in range(rng.choice([0, 1] if chance > 0.65 else [1, 1, 1, 2, 3])):
            rng.choice(CONTENT)(file, rng)
    entries, payload = file.table()
    if 0.65 < chance < 0.85:
        for _ in range(rng.choice([1, 1, 2])):
            with contextlib.suppress(LookupError, TypeError, AttributeError):  # an earlier lie left nothing to bend
                rng.choice(HEADER)(entries, rng)
    data = join(spelled(entries), payload)
    if chance > 0.85:
        for _ in range(rng.choice([1, 1, 2])):
            data = rng.choice(BYTES)(data, rng)
    return data


def damaged(seed: int, index: int) -> tuple[str, bytes]:
    """Input number `index` of a run: the name of the valid file, and the damaged one."""
    from fuzz.seeds import seeds

    rng = random.Random(f"{seed}:{index}")
    name = rng.choice(sorted(seeds()))
    return name, mutate(seeds()[name], rng)
