"""What the metadata of a file says, in words that people use: what it is, what it was trained on, how, and when.

Every entry is some program's text. Whatever cannot be read is a note, never an error, and nothing here decides how a
tensor is read.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nerine.errors import shown

__all__ = ["Dataset", "Tag", "Training", "read_training"]

UNREADABLE = (ValueError, TypeError, LookupError, RecursionError, ArithmeticError, OSError, AttributeError)
NOTHING = frozenset({"", "None", "null", "False", "{}", "[]", "0", "0.0"})
MOST = 200  # entries of one kind that are kept; a hostile file may have millions

# {group: {label: the keys that may say it, the first that does counts}}
ENTRIES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "about": {
        "title": ("modelspec.title", "ss_output_name", "name"),
        "author": ("modelspec.author", "author"),
        "description": ("modelspec.description", "description"),
        "trigger phrase": ("modelspec.trigger_phrase", "trigger_phrase", "trigger_word"),
        "usage": ("modelspec.usage_hint",),
        "tags": ("modelspec.tags",),
        "license": ("modelspec.license", "license"),
        "dated": ("modelspec.date",),
        "merged from": ("modelspec.merged_from",),
        "comment": ("ss_training_comment",),
        "written by": ("modelspec.implementation", "software"),
    },
    "base model": {
        "file": ("ss_sd_model_name",),
        "kind": ("modelspec.architecture", "ss_base_model_version", "base_model", "architecture"),
        "version": ("ss_base_model_version",),
        "hash": ("ss_new_sd_model_hash", "ss_sd_model_hash"),
        "prediction": ("modelspec.prediction_type",),
        "v2": ("ss_v2",),
        "VAE": ("ss_vae_name",),
        "clip skip": ("ss_clip_skip", "modelspec.encoder_layer"),
    },
    "network": {
        "module": ("ss_network_module",),
        "rank": ("ss_network_dim",),
        "alpha": ("ss_network_alpha",),
        "dropout": ("ss_network_dropout",),
    },
    "training": {
        "optimiser": ("ss_optimizer",),
        "learning rate": ("ss_learning_rate",),
        "of the denoiser": ("ss_unet_lr",),
        "of the text encoder": ("ss_text_encoder_lr",),
        "schedule": ("ss_lr_scheduler",),
        "warm-up steps": ("ss_lr_warmup_steps",),
        "steps": ("ss_steps",),
        "most steps": ("ss_max_train_steps",),
        "epochs": ("ss_epoch",),
        "most epochs": ("ss_num_epochs",),
        "batch": ("ss_total_batch_size", "ss_batch_size_per_device"),
        "gradient accumulation": ("ss_gradient_accumulation_steps",),
        "precision": ("ss_mixed_precision",),
        "all in fp16": ("ss_full_fp16",),
        "base in fp8": ("ss_fp8_base",),
        "seed": ("ss_seed",),
        "min SNR gamma": ("ss_min_snr_gamma",),
        "loss": ("ss_loss_type",),
        "noise offset": ("ss_noise_offset",),
        "input perturbation": ("ss_ip_noise_gamma",),
        "zero terminal SNR": ("ss_zero_terminal_snr",),
        "debiased estimation": ("ss_debiased_estimation",),
        "timesteps": ("ss_timestep_sampling", "ss_weighting_scheme"),
        "flow shift": ("ss_discrete_flow_shift",),
        "guidance": ("ss_guidance_scale",),
        "norms limited to": ("ss_scale_weight_norms",),
        "gradients clipped at": ("ss_max_grad_norm",),
        "caption dropout": ("ss_caption_dropout_rate",),
        "prior loss weight": ("ss_prior_loss_weight",),
    },
    "data": {
        "images": ("ss_num_train_images",),
        "regularisation images": ("ss_num_reg_images",),
        "resolution": ("ss_resolution", "modelspec.resolution"),
        "captions shuffled": ("ss_shuffle_caption",),
        "tokens kept first": ("ss_keep_tokens",),
        "flipped": ("ss_flip_aug",),
        "colours changed": ("ss_color_aug",),
        "randomly cropped": ("ss_random_crop",),
    },
}


@dataclass(frozen=True)
class Dataset:
    """A folder of training pictures."""

    name: str
    images: int
    repeats: int


@dataclass(frozen=True)
class Tag:
    """A word of the captions, how many captions have it, and which share of the pictures that is, where known."""

    word: str
    count: int
    share: float | None = None


@dataclass(frozen=True)
class Training:
    """What a file says of its making: {group: {label: text}}, folders, words of the captions, and what was unreadable.

    `triggers` are words that the file itself calls so, and words that are in nearly every caption.
    """

    groups: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    datasets: tuple[Dataset, ...] = ()
    tags: tuple[Tag, ...] = ()
    triggers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_training(metadata: Mapping[str, str], config: Mapping[str, Any] | None = None) -> Training:
    """The metadata of a file, and the settings that stand beside it in a folder."""
    notes: list[str] = []
    groups = {group: _chosen(entries, metadata) for group, entries in ENTRIES.items()}
    groups["network"] |= _table(_json(metadata, "ss_network_args", notes), ())
    groups["training"] |= _table(_json(metadata, "ss_optimizer_args", notes), ())
    groups["when"] = _when(metadata, notes)
    groups["LyCORIS settings"] = _table(_json(metadata, "lycoris_config", notes), ())
    groups["PEFT settings"] = _table(
        _json(metadata, "lora_adapter_metadata", notes), ("target_modules", "auto_mapping")
    )
    groups["PEFT folder"] = _table(config, ("target_modules", "auto_mapping", "inference_mode"))
    datasets = _datasets(metadata, notes)
    tags = _tags(metadata, datasets, notes)
    said = groups["about"].get("trigger phrase", "")
    often = [tag.word for tag in tags if (tag.share or 0) >= 0.9]
    triggers = tuple(dict.fromkeys([*([said] if said else []), *often[:8]]))
    return Training({name: found for name, found in groups.items() if found}, datasets, tags, triggers, tuple(notes))


def _chosen(entries: Mapping[str, tuple[str, ...]], metadata: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for label, keys in entries.items():
        said = next((metadata[key].strip() for key in keys if metadata.get(key, "").strip() not in NOTHING), "")
        if said and said != found.get("kind"):
            found[label] = said
    for label in ("steps", "epochs"):
        most = found.pop(f"most {label}", "")
        if most and most != found.get(label):
            found[label] = f"{found[label]} of {most}" if label in found else f"at most {most}"
    return found


def _json(metadata: Mapping[str, str], key: str, notes: list[str]) -> Any:
    """The JSON of an entry; None where there is none, or it is damaged."""
    if metadata.get(key, "") in NOTHING:
        return None
    try:
        return json.loads(metadata[key])
    except UNREADABLE as error:
        notes.append(f"metadata {key} is damaged and was left out ({shown(error, 80)})")
        return None


def _table(value: Any, hidden: Iterable[str]) -> dict[str, str]:
    """The settings of a table as text; those of tables within it have names with a dot."""
    if not isinstance(value, Mapping):
        return {}
    found: dict[str, str] = {}
    for key, inner in list(value.items())[:MOST]:
        if str(key).rpartition(".")[2] in hidden:
            continue
        if isinstance(inner, Mapping):
            found |= {f"{key}.{name}": text for name, text in _flat(inner).items()}
        elif _text(inner) not in NOTHING:
            found[str(key)] = _text(inner)
    return found


def _flat(table: Mapping[Any, Any]) -> dict[str, str]:
    return {str(key): _text(value) for key, value in list(table.items())[:MOST] if _text(value) not in NOTHING}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)[:400]


def _when(metadata: Mapping[str, str], notes: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    times = {}
    for label, key in (("began", "ss_training_started_at"), ("ended", "ss_training_finished_at")):
        if metadata.get(key, "") in NOTHING:
            continue
        try:
            times[label] = datetime.datetime.fromtimestamp(float(metadata[key]), datetime.timezone.utc)
            found[label] = f"{times[label]:%Y-%m-%d %H:%M} UTC"
        except UNREADABLE as error:
            notes.append(f"metadata {key} is no time and was left out ({shown(error, 80)})")
    if len(times) == 2 and times["ended"] >= times["began"]:
        found["took"] = _duration((times["ended"] - times["began"]).total_seconds())
    return found


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 90:
        return f"{minutes} min" if minutes else f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


def _whole(value: Any) -> int:
    """A count; 0 where it is none."""
    try:
        return min(max(int(value), 0), 2**53)
    except UNREADABLE:
        return 0


def _datasets(metadata: Mapping[str, str], notes: list[str]) -> tuple[Dataset, ...]:
    folders = _json(metadata, "ss_dataset_dirs", notes)
    found = []
    if isinstance(folders, Mapping):
        for name, told in folders.items():
            if isinstance(told, Mapping):
                found.append(Dataset(str(name), _whole(told.get("img_count")), _whole(told.get("n_repeats"))))
    for one in _tables(_json(metadata, "ss_datasets", notes) if not found else None):
        for subset in _tables(one.get("subsets")):
            name = str(subset.get("image_dir") or subset.get("class_tokens") or "")
            found.append(Dataset(name, _whole(subset.get("img_count")), _whole(subset.get("num_repeats"))))
    return tuple(found[:MOST])


def _tables(value: Any) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _tags(metadata: Mapping[str, str], datasets: Iterable[Dataset], notes: list[str]) -> tuple[Tag, ...]:
    """The words of all captions, the most frequent first."""
    whole = _json(metadata, "ss_tag_frequency", notes)
    folders: list[Any] = [whole] if isinstance(whole, Mapping) else []
    if not folders:
        folders = [one.get("tag_frequency") for one in _tables(_json(metadata, "ss_datasets", []))]
    counts: dict[str, int] = {}
    named: set[str] = set()
    for one in folders:
        for name, words in one.items() if isinstance(one, Mapping) else ():
            named.add(str(name))
            for word, count in words.items() if isinstance(words, Mapping) else ():
                text = str(word).strip()
                counts[text] = counts.get(text, 0) + _whole(count)
    images = {d.name: d.images for d in datasets if d.name in named}
    total = sum(images.values()) if len(images) == len(named) else 0
    most = sorted(((count, word) for word, count in counts.items() if word and count), key=lambda o: (-o[0], o[1]))
    return tuple(Tag(word, count, min(count / total, 1.0) if total else None) for count, word in most[:MOST])
