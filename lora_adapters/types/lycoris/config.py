"""Adapters with changes of any kind: LoHa, LoKr, DoRA, full, norms, GLoRA, IA3, OFT, BOFT, and mixtures of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lora_adapters.convert.deltas.base import Delta, with_tensors
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.deltas.with_scalar import without_scalars
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import nearest
from lora_adapters.convert.parsing import number
from lora_adapters.presets import Preset, chosen, find_preset
from lora_adapters.types.adapter_type import AdapterType, NetworkArg, flag
from lora_adapters.types.base import AdapterConfig, check
from lora_adapters.types.layers import layers

from .initial import OPTIONS, AlgorithmOptions, initial_change
from .layer import DeltaVariant, held, hold
from .norm_layer import NormLayer
from .operations import norms

_ALGO_OF = {"networks.loha": "loha", "networks.lokr": "lokr", "loha": "loha", "lokr": "lokr"}
_OPTIONS = tuple(option.name for option in fields(AlgorithmOptions) if option.name not in ("algo", "train_on_input"))
_FLAGS = (*(name for name in _OPTIONS if name not in ("factor", "constraint")), "train_norm")
# The tensors that LoRA+'s rate applies to in kohya's trainer, by the kind of change.
_UP = {"LoRA": ("up",), "LoHa": ("w2_a",), "LoKr": ("w1", "w1_a", "w1_b")}


@dataclass
class LycorisConfig(AdapterConfig):
    """An adapter whose modules can be of different kinds: LoHa, LoKr, DoRA, full, norm and others.

    With `algo`, each module is initialised with a change of that kind with ΔW = 0. Without it, changes are set for each
    layer (see `layer.hold`), and the other layers are plain LoRA. The options have the names and meanings of LyCORIS'
    network arguments; see `initial.AlgorithmOptions`. Source: LyCORIS (arXiv:2309.14859).
    """

    algo: str | None = field(
        default=None, metadata={"help": "lora, locon, loha, lokr, full, ia3, glora, diag-oft or boft."}
    )
    factor: int = field(
        default=-1, metadata={"help": "LoKr: size of the smaller factor; -1: close to the square root."}
    )
    decompose_both: bool = field(default=False, metadata={"help": "LoKr: allow both factors to be low-rank."})
    full_matrix: bool = field(default=False, metadata={"help": "LoKr: keep both factors full-rank."})
    unbalanced_factorization: bool = field(default=False, metadata={"help": "LoKr: give the first factor more rows."})
    use_tucker: bool = field(
        default=False, metadata={"help": "Use Tucker decomposition for convolutions larger than 1x1."}
    )
    use_scalar: bool = field(
        default=False, metadata={"help": "Train a scalar that starts at 0, instead of a matrix of zeros."}
    )
    dora_wd: bool = field(default=False, metadata={"help": "Use weight decomposition (DoRA)."})
    wd_on_output: bool = field(
        default=True, metadata={"help": "DoRA: magnitudes of output channels, not input channels."}
    )
    rs_lora: bool = field(default=False, metadata={"help": "Scale by alpha/√rank (rsLoRA)."})
    constraint: float = field(default=0.0, metadata={"help": "OFT and BOFT: limit of the rotations; 0: no limit."})
    rescaled: bool = field(default=False, metadata={"help": "OFT and BOFT: train a scale for each row."})
    train_norm: bool = field(
        default=False, metadata={"help": "Also train normalisation layers in the preset's blocks."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.use_rslora = self.rs_lora
        self._register_custom_module(dict.fromkeys(norms(), NormLayer))
        check(not self.train_norm or self.preset is not None, "train_norm needs a preset, which chooses the layers")
        if self.algo is not None:
            AlgorithmOptions(self.algo, **{name: getattr(self, name) for name in _OPTIONS})

    def check_preset(self, preset: Preset) -> None:
        """Raise AdapterError for unknown algorithms and options of single modules in a preset."""
        check(self.algo is not None or not preset.overrides, f"preset {self.preset} needs an algo")
        for override in preset.overrides:
            try:
                self.options_for(override.options)
            except AdapterError as error:
                raise AdapterError(f"preset {self.preset}: {override.pattern}: {error}") from None

    def options_for(self, own: Mapping[str, Any]) -> AlgorithmOptions:
        """The options of a module: its `own` options, completed by those of the config that its algorithm has."""
        algo = own.get("algo", self.algo)
        check(algo in OPTIONS, f"unknown algo {algo}: {', '.join(OPTIONS)} are known")
        common = {name: getattr(self, name) for name in _OPTIONS if name in OPTIONS[algo]}
        own = {name: value for name, value in own.items() if name not in ("algo", "dim", "alpha")}
        known = {option.name for option in fields(AlgorithmOptions)} - {"algo"}
        for name in own:
            check(name in known, f"unknown option {name}{nearest(name, known)}")
        return AlgorithmOptions(algo, **{**common, **own})


class LycorisType(AdapterType):
    """Changes of any kind; low-rank pairs are computed as plain LoRA."""

    name, title, config = "Lycoris", "LyCORIS", LycorisConfig
    network_modules = ("lycoris.kohya", "lycoris", *_ALGO_OF)
    network_args: ClassVar = {
        "algo": NetworkArg(str.lower, "a name"),
        "factor": NetworkArg(int, "a whole number"),
        **dict.fromkeys(_FLAGS, NetworkArg(flag, "True or False")),
        "constraint": NetworkArg(number, "a number"),
    }
    variant = DeltaVariant

    def fields(self, network_module: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """networks.loha and networks.lokr adapt kohya's modules; lycoris.kohya has LyCORIS' defaults."""
        own = _ALGO_OF.get(network_module)
        if own is not None:
            asked = given.get("algo", own)
            check(asked == own, f"algo={asked}: it goes with network_module lycoris.kohya, not with {network_module}")
            return {"algo": own}
        algo = given.get("algo", "lora")
        check(algo != "dylora", "algo=dylora: give network_module networks.dylora, which trains every rank")
        defaults = {"algo": algo, "preset": "ia3" if algo == "ia3" else "full", "conv_alpha": given["lora_alpha"]}
        return {name: value for name, value in defaults.items() if name not in given}

    def idle(self, network_module: str, network_args: Mapping[str, str]) -> dict[str, str]:
        """Options that the algorithm does not have, which LyCORIS ignores."""
        algo = _ALGO_OF.get(network_module) or str(network_args.get("algo", "lora")).lower()
        foreign = self.network_args.keys() - {*OPTIONS.get(algo, _OPTIONS), "algo", "train_norm"}
        return {name: f"algo {algo} has no such option" for name in network_args if name in foreign}

    def covered(self, model: nn.Module, config: Any) -> list[str]:
        """As for all types, plus normalisation layers with train_norm."""
        if not config.train_norm:
            return super().covered(model, config)
        return [layer.path for layer in chosen(model, find_preset(config.preset), norms=True)]

    def attach(self, model: nn.Module, adapter_name: str, config: Any) -> None:
        """With `algo`, set the initial changes of the layers; see `initial`."""
        if config.algo is None:
            return
        preset = find_preset(config.preset) if config.preset else None
        own = {layer.path: layer.options for layer in chosen(model, preset, config.train_norm)} if preset else {}
        for path, layer in layers(model, adapter_name):
            options = own.get(path, {})
            rank = options.get("dim", layer.r[adapter_name])
            alpha = options.get("alpha", layer.lora_alpha[adapter_name])
            try:
                change = initial_change(layer.get_base_layer(), rank, alpha, config.options_for(options))
            except AdapterError as error:
                raise AdapterError(f"{path}: {error}") from None
            if not (isinstance(change, LowRank) and rank == layer.r[adapter_name]):  # else PEFT's own layer suffices
                hold(layer, adapter_name, change)

    def detach(self, model: nn.Module, adapter_name: str) -> None:
        """Remove the variants of a deleted adapter, which old releases of PEFT leave in its layers."""
        for layer in model.modules():
            if not isinstance(layer, LoraLayer) or not isinstance(layer.lora_variant.get(adapter_name), DeltaVariant):
                continue
            if held(layer, adapter_name) is None:
                del layer.lora_variant[adapter_name]

    def delta(self, layer: Any, adapter_name: str, stabilized: bool = False) -> Delta:
        """The change in a layer, as stored in files.

        Args:
            layer: A layer that has the adapter.
            adapter_name: The name of the adapter.
            stabilized: Unused; it is for rsLoRA.

        Returns:
            A change with the live parameters as tensors, detached. A trained scalar is multiplied into them.
        """
        return without_scalars(with_tensors(layer.lora_A[adapter_name].change, lambda _, tensor: tensor.detach()))

    def parts(self, layer: Any, adapter_name: str) -> Iterator[tuple[str, nn.Module]]:
        """Each tensor of the change; the kind "up" is for tensors to which kohya's trainer applies LoRA+'s rate."""
        weights = layer.lora_A[adapter_name]
        change, prefix = weights.change, ""
        while hasattr(change, "change"):
            change, prefix = change.change, f"{prefix}change_"
        up = {f"{prefix}{name}" for name in _UP.get(change.kind, ())}
        for name, parameter in weights.named_parameters():
            yield "up" if name in up else "change", nn.ParameterList([parameter])

    @contextmanager
    def as_used(self, model: nn.Module, adapter_names: list[str]) -> Iterator[None]:
        """Raise AdapterError if an adapter has a change that is not a low-rank pair, since factors do not suffice."""
        for name in adapter_names:
            for path, layer in layers(model, name):
                if (weights := held(layer, name)) is not None:
                    kind = weights.change.kind
                    raise AdapterError(f"adapter {name} has a {kind} in {path}, which is not a low-rank pair")
        yield


TYPE = LycorisType()
