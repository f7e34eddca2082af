"""The settings of a training run: every key once, with its default and its explanation.

The configuration file, the options of the command line, the commented example and the table of the documentation are
all made from what stands here. Nothing here imports torch, so that help comes at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from nerine.errors import OptionError

__all__ = [
    "AdapterSettings",
    "BaseSettings",
    "DataSettings",
    "Key",
    "ObjectiveSettings",
    "OptimizerSettings",
    "OutputSettings",
    "SampleSettings",
    "Subset",
    "TrainSettings",
    "ValidationSettings",
    "keys",
]

CACHES = ("auto", "disk", "memory", "off")


def key(
    default: Any, about: str, *, choices: tuple[str, ...] = (), option: str = "", at_least: float | None = None
) -> Any:
    """A setting: `about` explains it, `choices` are what a text may be, `option` its name on the command line where
    that is not the key's own, `at_least` the smallest number allowed."""
    metadata = {"about": about, "choices": choices, "option": option, "at_least": at_least}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """The model that is fine-tuned, and how it lies in memory."""

    base: str = key("tiny", 'a diffusers folder, a single-file checkpoint, or "tiny", the model that comes with nerine')
    config: Path | None = key(
        None,
        "for a single-file checkpoint: the folder with the configurations of its model (model_index.json, ...)",
        option="--base-config",
    )
    download: bool = key(False, "a single-file checkpoint may fetch missing configurations from the Hugging Face hub")
    dtype: str = key(
        "auto",
        "number format of the frozen weights; auto: as trained on a CPU, bf16 on a GPU",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    quantize: str = key(
        "none", "weights of the frozen denoiser in 4 or 8 bits", choices=("none", "nf4", "int8", "int4", "fp8")
    )
    offload: str = key(
        "none",
        "group: the denoiser's weights wait in the CPU's memory and come block by block",
        choices=("none", "group"),
    )
    device: str = key("auto", "where to train: auto, cpu, cuda, mps, ...")
    mixed_precision: str = key(
        "auto",
        "number format of the computing; auto: fp32 on a CPU, bf16 on a GPU",
        choices=("auto", "no", "bf16", "fp16"),
    )
    gradient_checkpointing: bool = key(False, "activations are computed again in backward: less memory, more time")
    compile: bool = key(False, "the denoiser through torch.compile")
    shard: bool = key(False, "several processes: each keeps a share of the denoiser (FSDP2) instead of all of it")


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """What is trained."""

    algo: str = key("lora", "lora, loha, lokr, dylora, tlora, glora, full, ia3, diag-oft, boft, ...")
    rank: int | None = key(None, "rank of the adapters", at_least=1)
    alpha: float | None = key(None, "the change is scaled by alpha/rank; as the rank if left out")
    dora: bool = key(False, "weight decomposition around it")
    settings: Mapping[str, Any] = key({}, "other settings of the algorithm, as { factor = 8 }", option="--set")
    targets: tuple[str, ...] = key(("all",), "presets or patterns of layers; !PATTERN leaves out", option="--targets")
    rules: Path | None = key(None, "a file of rules (TOML) in place of algo, rank, ... and targets")
    train_norm: bool = key(False, "norms are trained as well")
    dropout: float = key(0.0, "share of the change's outputs that is left out at random", at_least=0)
    rank_dropout: float = key(0.0, "share of the ranks that is left out at random", at_least=0)
    module_dropout: float = key(0.0, "share of the layers whose change is left out at random", at_least=0)
    start_from: Path | None = key(None, "an adapter file whose values the training starts from")
    text_encoder: bool = key(False, "the text encoders are trained as well")
    text_encoder_lr: float | None = key(None, "their learning rate; lr if left out", at_least=0)


@dataclass(frozen=True, kw_only=True)
class Subset:
    """One folder of pictures, as [[subset]] in the file; what is left out is as in [data]."""

    folder: Path
    repeats: int | None = None
    caption: str | None = None  # for pictures without one of their own
    prefix: str | None = None
    regularization: bool = False
    shuffle_tags: bool | None = None
    keep_tokens: int | None = None
    caption_dropout: float | None = None
    flip: bool | None = None


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The pictures and their captions."""

    data: tuple[Path, ...] = key((), "folder of pictures with captions; several may be given", option="--data")
    regularization: Path | None = key(None, "folder of pictures of the class, for prior preservation")
    prior_weight: float = key(1.0, "weight of the loss of the regularisation pictures", at_least=0)
    resolution: int | None = key(None, "side of a square of as many pixels; the base's own if left out", at_least=8)
    buckets: bool = key(True, "pictures keep about their own aspect ratio; off: all are cropped to squares")
    bucket_step: int | None = key(None, "sides are multiples of this; the base's own if left out", at_least=1)
    max_aspect: float = key(2.0, "the longest side of a bucket over its shortest, at most", at_least=1)
    upscale: bool = key(True, "small pictures are enlarged; off: they go to smaller buckets")
    crop: str = key("center", "which part of a picture is kept", choices=("center", "random"))
    flip: bool = key(False, "half of the pictures are mirrored")
    caption_extension: str = key(".txt", "where the caption of a picture is, beside it")
    caption: str | None = key(None, "the caption of pictures without one; the words in a folder's name if left out")
    prefix: str = key("", "words in front of every caption, such as a trigger word")
    caption_dropout: float = key(0.0, "share of the captions that is left out, for guidance", at_least=0)
    shuffle_tags: bool = key(False, "the parts of a caption between commas come in random order")
    keep_tokens: int = key(0, "so many parts behind the prefix stay where they are", at_least=0)
    cache_latents: str = key("auto", "keep encoded pictures; auto: on the disk if it can", choices=CACHES)
    cache_text: str = key("auto", "keep encoded captions; auto: on the disk if it can", choices=CACHES)
    cache_folder: Path | None = key(None, "where they are kept; <out>/cache if left out")
    workers: int = key(2, "threads that read pictures", at_least=0)


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """What the denoiser is asked for, and how its errors count."""

    prediction: str = key(
        "auto", "what it predicts; auto: what its scheduler says", choices=("auto", "epsilon", "v", "flow")
    )
    timesteps: str = key(
        "auto",
        "how times are drawn; auto: uniform, for flow logit-normal",
        choices=("auto", "uniform", "logit-normal", "shifted"),
    )
    timestep_mean: float = key(0.0, "logit-normal: the mean")
    timestep_std: float = key(1.0, "logit-normal: the standard deviation", at_least=0)
    timestep_shift: float = key(3.0, "shifted: how far towards noise (3: SD3)", at_least=0)
    min_timestep: int = key(0, "the least noise, of 1000", at_least=0)
    max_timestep: int = key(1000, "the most noise, of 1000", at_least=1)
    weighting: str = key("none", "how times count", choices=("none", "min-snr", "debiased"))
    min_snr_gamma: float = key(5.0, "min-snr: gamma", at_least=0)
    loss: str = key("l2", "the error", choices=("l2", "l1", "huber"))
    huber_c: float = key(0.1, "huber: from squares to absolute values at this error", at_least=0)
    noise_offset: float = key(0.0, "noise that is the same for a whole picture's channel", at_least=0)
    zero_terminal_snr: bool = key(False, "the noise schedule ends in noise alone (for v)")
    penalty: float = key(0.0, "weight of what the algorithm asks for (T-LoRA: orthogonality)", at_least=0)


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How the values move."""

    optimizer: str = key("adamw", "adamw, adamw8bit, prodigy, schedulefree-adamw, or any of torch.optim")
    lr: float | None = key(None, "learning rate; what suits the base if left out", at_least=0)
    optimizer_args: Mapping[str, Any] = key({}, "its arguments, as { weight_decay = 0.01 }", option="--optimizer-arg")
    lora_plus: float = key(1.0, "LoRA+: the rate of the up matrices is so many times as high", at_least=0)
    schedule: str = key(
        "cosine",
        "the learning rate over time",
        choices=("constant", "linear", "cosine", "cosine-restarts", "polynomial"),
    )
    schedule_cycles: int = key(1, "cosine-restarts: how many", at_least=1)
    schedule_power: float = key(1.0, "polynomial: the power", at_least=0)
    warmup: float = key(0.05, "steps in which the rate grows; below 1 the share of all steps", at_least=0)
    end_lr: float = key(0.0, "the rate at the end, over lr", at_least=0)
    steps: int | None = key(None, "how many steps; 1,000 without epochs", at_least=1)
    epochs: int | None = key(None, "how often each picture is seen, in place of steps", at_least=1)
    batch_size: int = key(4, "pictures at once, in each process", at_least=1)
    accumulate: int = key(1, "batches of a step", at_least=1)
    clip: float = key(1.0, "the gradients' norm is at most this; 0: no limit", at_least=0)
    max_norm: float = key(0.0, "the change of a layer has at most this norm; 0: no limit", at_least=0)
    ema: float = key(0.0, "keep a moving average of the values with this decay, as 0.999; 0: none", at_least=0)
    seed: int = key(0, "the same seed gives the same run", at_least=0)


@dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """Pictures that are kept out of the training, to see whether it still learns."""

    validation: Path | None = key(None, "folder of pictures to validate with")
    validation_share: float = key(0.0, "in place of a folder: the share of the pictures kept back", at_least=0)
    validate_every: int = key(0, "steps between validations; 0: a tenth of all", at_least=0)
    validation_times: int = key(4, "at how many fixed times each picture is tried", at_least=1)


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Pictures that are drawn on the way."""

    prompts: tuple[str, ...] = key((), "what to draw; several may be given", option="--prompt")
    sample_every: int = key(0, "steps between samples; 0: a quarter of all", at_least=0)
    sample_steps: int = key(20, "denoising steps", at_least=1)
    guidance: float | None = key(None, "guidance scale; the base's own if left out", at_least=0)
    negative: str = key("", "what not to draw")
    sample_width: int | None = key(None, "pixels; the resolution if left out", at_least=8)
    sample_height: int | None = key(None, "pixels; the resolution if left out", at_least=8)
    sample_seed: int = key(0, "of their noise", at_least=0)


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What is written, and where."""

    out: Path = key(Path("nerine-train"), "folder for everything that the run writes")
    name: str = key("adapter", "name of the adapter file, without .safetensors")
    dialect: str = key("lycoris", "for which programs: lycoris, kohya, diffusers, peft, comfy, ...")
    save_dtype: str = key("fp16", "number format of the file", choices=("fp32", "fp16", "bf16"))
    save_every: int = key(0, "steps between checkpoints; 0: a tenth of all", at_least=0)
    keep: int = key(2, "so many of the latest checkpoints are kept", at_least=1)
    trackers: tuple[str, ...] = key((), "where else the numbers go: tensorboard, wandb, trackio", option="--tracker")
    project: str = key("nerine", "the project's name there")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """All of them. `subsets` are the folders with settings of their own."""

    base: BaseSettings = field(default_factory=BaseSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    data: DataSettings = field(default_factory=DataSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    samples: SampleSettings = field(default_factory=SampleSettings)
    output: OutputSettings = field(default_factory=OutputSettings)
    subsets: tuple[Subset, ...] = ()


@dataclass(frozen=True)
class Key:
    """One setting, as the file and the command line know it."""

    section: str
    name: str
    kind: str  # its annotation
    default: Any
    about: str
    choices: tuple[str, ...]
    option: str
    at_least: float | None

    @classmethod
    def of(cls, section: str, one: Field[Any]) -> Key:
        about = one.metadata
        option = about["option"] or "--" + one.name.replace("_", "-")
        default = {} if one.default is MISSING else one.default
        return cls(
            section, one.name, str(one.type), default, about["about"], about["choices"], option, about["at_least"]
        )

    @property
    def kinds(self) -> frozenset[str]:
        """The types that it takes, by name: bool, int, float, str, Path, tuple, Mapping, None."""
        return frozenset(part.split("[")[0].strip() for part in self.kind.split("|"))


def keys() -> Iterator[Key]:
    """Every setting, in the order in which it is explained."""
    for section in fields(TrainSettings):
        if section.name != "subsets":
            for one in fields(section.default_factory):  # type: ignore[arg-type]
                yield Key.of(section.name, one)


def check_number(where: str, value: float, at_least: float | None) -> None:
    """Raises OptionError where a number is too small."""
    if at_least is not None and value < at_least:
        raise OptionError(f"{where} must be at least {at_least:g}, got {value:g}")
