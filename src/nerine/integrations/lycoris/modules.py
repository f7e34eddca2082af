"""LyCORIS's module classes: one an algorithm, made for a layer as LyCORIS makes them, or from the tensors of a file."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nerine.algorithms import Algorithm
from nerine.api import Choice, read_fittings
from nerine.errors import OptionError
from nerine.files.store import Source
from nerine.integrations.lycoris.hosted import Hosted
from nerine.integrations.lycoris.settings import algorithm_for, layer_options, noise_of
from nerine.integrations.lycoris.timesteps import mask_for
from nerine.model.adapter import Adapter, Context, Noise
from nerine.model.fitting import Fitting, adapter_for, fresh
from nerine.model.layer import is_layer, kind_of, parameter_site, site_of
from nerine.model.mount import Spot
from nerine.model.parametrize import parametrize
from nerine.model.targets import Rule, Target

__all__ = [
    "MODULE_LIST",
    "ButterflyOFTModule",
    "DiagOFTModule",
    "DyLoraModule",
    "FullModule",
    "GLoRAModule",
    "IA3Module",
    "LoConModule",
    "LohaModule",
    "LokrModule",
    "LycorisBaseModule",
    "NormModule",
    "TLoraModule",
    "get_module",
    "hosted_of",
    "layer_of",
    "make_module",
    "new_adapter",
]


def layer_of(module: nn.Module) -> nn.Module:
    """The layer itself where another program (PEFT) has put one of its own around it."""
    inner = getattr(module, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else module


def new_adapter(
    spot: Spot,
    algorithm: Algorithm,
    options: Mapping[str, Any],
    context: Context | None = None,
    strength: float = 1.0,
) -> Adapter:
    """A fresh adapter for a weight, which suits `algorithm`, with the dropouts of parsed options; at first it changes
    nothing."""
    rule = Rule(spot.path, algorithm, strength=strength)
    fitting = fresh(Target(spot, kind_of(spot.holder, spot.attr), rule, algorithm))
    return adapter_for(fitting, Noise(**noise_of(options)), context_for(options, context), own=False)


def context_for(options: Mapping[str, Any], context: Context | None = None) -> Context:
    """What adapters share; those of T-LoRA listen to the masks of their group."""
    context = context or Context()
    if (options.get("algo") or "") == "tlora":
        context.ranks = functools.partial(mask_for, options.get("mask_group_id") or 0)
    return context


class LycorisBaseModule(Hosted):
    """An adapter for `org_module`, not on it before `apply_to`.

    `lora_dim` is the rank (of a rotation the most that a block may have), `alpha` None or 0 the rank itself. Further
    options are those of `network_args`, under their names there or LyCORIS's names here.

    Raises:
        OptionError: an unknown option, or one that does not fit the layer.
        UnsupportedBase: no layer that can be adapted.
    """

    name: ClassVar[str] = ""
    weight_list: ClassVar[tuple[str, ...]] = ()
    weight_list_det: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        lora_name: str,
        org_module: nn.Module,
        multiplier: float = 1.0,
        lora_dim: int = 4,
        alpha: float | None = 1,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        use_tucker: bool = False,
        use_scalar: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        own = {"dim": lora_dim, "alpha": alpha, "use_tucker": use_tucker, "use_scalar": use_scalar}
        own |= {"dropout": dropout, "rank_dropout": rank_dropout, "module_dropout": module_dropout}
        self._make(lora_name, org_module, multiplier, {**own, **options})

    def _make(self, lora_name: str, org_module: nn.Module, multiplier: float, options: Mapping[str, Any]) -> None:
        layer = layer_of(org_module)
        spot = Spot(lora_name, layer, site_of(layer, lora_name))
        parsed = layer_options({**options, "algo": self.algo}, type(self).__name__)
        algorithm = algorithm_for(parsed, spot.site)
        why = algorithm.unsuited(spot.site)
        if why:
            raise OptionError(f"{spot.path}: {why}")
        self._hold(lora_name, spot, new_adapter(spot, algorithm, parsed, strength=float(multiplier)))

    @classmethod
    def parametrize(cls, org_module: nn.Module, attr: str, *args: Any, **kwargs: Any) -> Adapter:
        """Make the parameter `org_module.attr` the changed weight; the arguments are those of the class from
        `multiplier` on. Returns the adapter."""
        names = ("multiplier", "lora_dim", "alpha", "dropout", "rank_dropout", "module_dropout", "use_tucker")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        strength = float(given.pop("multiplier", 1.0))
        options = layer_options({"dim": 4, "alpha": 1, **_dimmed(given), "algo": cls.algo}, cls.__name__)
        alone = attr != "weight" or not is_layer(org_module)
        site = parameter_site(org_module, attr, attr) if alone else site_of(org_module, attr)
        return parametrize(org_module, attr, algorithm_for(options, site), strength=strength)

    @classmethod
    def algo_check(cls, state_dict: Mapping[str, Tensor], lora_name: str) -> bool:
        """Whether a file has tensors of this class for a layer."""
        return any(f"{lora_name}.{key}" in state_dict for key in cls.weight_list_det)

    @classmethod
    def extract_state_dict(cls, state_dict: Mapping[str, Tensor], lora_name: str) -> list[Tensor | None]:
        """Its tensors in the order of `weight_list`."""
        return [state_dict.get(f"{lora_name}.{key}") for key in cls.weight_list]

    @classmethod
    def make_module_from_state_dict(cls, lora_name: str, orig_module: nn.Module, *weights: Tensor | None) -> Hosted:
        """The module that has these tensors."""
        found = {key: t for key, t in zip(cls.weight_list, weights, strict=False) if t is not None}
        host = nn.ModuleDict({"layer": layer_of(orig_module)})
        source = Source.of({f"lycoris_layer.{key}": t for key, t in found.items()})
        _, (fitting,) = read_fittings(host, source, Choice(dialect="lycoris"))
        return hosted_of(fitting, lora_name)


def _dimmed(given: Mapping[str, Any]) -> dict[str, Any]:
    return {"dim" if key == "lora_dim" else key: value for key, value in given.items()}


class LoConModule(LycorisBaseModule):
    """LoRA on linear layers and convolutions."""

    name = "locon"
    algo = "lora"
    weight_list = ("lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "dora_scale")
    weight_list_det = ("lora_up.weight",)


class LohaModule(LycorisBaseModule):
    """LoHa: the product, entry by entry, of two low-rank matrices."""

    name = "loha"
    algo = "loha"
    weight_list = (
        "hada_w1_a",
        "hada_w1_b",
        "hada_w2_a",
        "hada_w2_b",
        "hada_t1",
        "hada_t2",
        "alpha",
        "dora_scale",
    )
    weight_list_det = ("hada_w1_a",)


class IA3Module(LycorisBaseModule):
    """(IA)³: a factor for each output, or with `train_on_input` each input."""

    name = "ia3"
    algo = "ia3"
    weight_list = ("weight", "on_input")
    weight_list_det = ("on_input",)


class LokrModule(LycorisBaseModule):
    """LoKr: a Kronecker product."""

    name = "kron"
    algo = "lokr"
    weight_list = (
        "lokr_w1",
        "lokr_w1_a",
        "lokr_w1_b",
        "lokr_w2",
        "lokr_w2_a",
        "lokr_w2_b",
        "lokr_t1",
        "lokr_t2",
        "alpha",
        "dora_scale",
    )
    weight_list_det = ("lokr_w1", "lokr_w1_a")


class FullModule(LycorisBaseModule):
    """The whole difference of weight and bias."""

    name = "full"
    algo = "full"
    weight_list = ("diff", "diff_b")
    weight_list_det = ("diff",)


class NormModule(LycorisBaseModule):
    """The differences of scale and offset of a norm."""

    name = "norm"
    algo = "norm"
    weight_list = ("w_norm", "b_norm")
    weight_list_det = ("w_norm",)

    def __init__(
        self,
        lora_name: str,
        org_module: nn.Module,
        multiplier: float = 1.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        rank_dropout_scale: bool = False,
        **_: Any,
    ) -> None:
        nn.Module.__init__(self)
        options = {"rank_dropout": rank_dropout, "module_dropout": module_dropout}
        self._make(lora_name, org_module, multiplier, options)


class _Rotation(LycorisBaseModule):
    """A turn of the outputs; the number of axes of its blocks tells which."""

    weight_list = ("oft_blocks", "rescale", "alpha")
    weight_list_det = ("oft_blocks",)
    axes: ClassVar[int]

    @classmethod
    def algo_check(cls, state_dict: Mapping[str, Tensor], lora_name: str) -> bool:
        blocks = state_dict.get(f"{lora_name}.oft_blocks")
        return blocks is not None and blocks.dim() == cls.axes


class DiagOFTModule(_Rotation):
    """Diag-OFT: the outputs are turned in blocks."""

    name = "oft"
    algo = "diag-oft"
    axes = 3


class ButterflyOFTModule(_Rotation):
    """BOFT: the outputs are turned in stages of blocks."""

    name = "boft"
    algo = "boft"
    axes = 4


class GLoRAModule(LycorisBaseModule):
    """GLoRA: low-rank changes before and beside the weight."""

    name = "glora"
    algo = "glora"
    weight_list = ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight", "alpha")
    weight_list_det = ("a1.weight",)


class DyLoraModule(LycorisBaseModule):
    """DyLoRA: trained at many ranks at once. In a file it is a LoRA."""

    name = "dylora"
    algo = "dylora"
    weight_list = ("lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "dora_scale")
    weight_list_det = ()


class TLoraModule(LycorisBaseModule):
    """T-LoRA: its rank follows the timestep."""

    name = "tlora"
    algo = "tlora"
    weight_list = (
        "q_layer.weight",
        "p_layer.weight",
        "lambda_layer",
        "alpha",
        "base_q",
        "base_p",
        "base_lambda",
    )
    weight_list_det = ("lambda_layer",)

    def orthogonality_regularization(self) -> tuple[Tensor, Tensor]:
        """(|PᵀP - 1|², |QQᵀ - 1|²), to be added to the loss."""
        t = self.adapter.params().tensors
        return _far_from_one(t["p"].flatten(1).mT), _far_from_one(t["q"].flatten(1))


def _far_from_one(rows: Tensor) -> Tensor:
    gram = rows @ rows.mT
    return (gram - torch.diag(torch.ones_like(gram[0]))).square().sum()


MODULE_LIST: list[type[LycorisBaseModule]] = [
    LoConModule,
    LohaModule,
    IA3Module,
    LokrModule,
    FullModule,
    NormModule,
    DiagOFTModule,
    ButterflyOFTModule,
    GLoRAModule,
    DyLoraModule,
    TLoraModule,
]


def class_of(algorithm: Algorithm) -> type[Hosted]:
    """The class of LyCORIS's for an algorithm; plain `Hosted` for one that LyCORIS has not."""
    inner = getattr(algorithm, "inner", algorithm)
    return next((kind for kind in MODULE_LIST if kind.algo == inner.name), Hosted)


def hosted_of(fitting: Fitting, lora_name: str, context: Context | None = None, noise: Noise | None = None) -> Hosted:
    """The module of LyCORIS's class around the adapter of a file."""
    algorithm = fitting.algorithm
    context = context_for({"algo": getattr(algorithm, "inner", algorithm).name}, context)
    return class_of(algorithm).of(lora_name, fitting.spot, adapter_for(fitting, noise or Noise(), context, own=False))


def get_module(
    lyco_state_dict: Mapping[str, Tensor], lora_name: str
) -> tuple[type[LycorisBaseModule], tuple[Tensor | None, ...]] | tuple[None, None]:
    """The class whose tensors a file has for a layer, and those tensors; (None, None) where it has none."""
    for module in MODULE_LIST:
        if module.algo_check(lyco_state_dict, lora_name):
            return module, tuple(module.extract_state_dict(lyco_state_dict, lora_name))
    return None, None


def make_module(
    lyco_type: type[LycorisBaseModule] | None, params: Any, lora_name: str, orig_module: nn.Module
) -> Hosted | None:
    """The module of that class with those tensors for a layer; None where there is no class.

    Raises:
        FormatError: the tensors are no known set.
        ShapeError: they do not fit the layer.
    """
    if lyco_type is None:
        return None
    return lyco_type.make_module_from_state_dict(lora_name, orig_module, *params)
