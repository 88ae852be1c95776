"""The rank controller of a DyLoRA, which stores its current rank; attaching and detaching controllers."""

import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_adapters.convert.deltas.low_rank import RANK_SCALINGS
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.formats.metadata import DyLora
from lora_adapters.types.found_layers import lora_layers
from lora_adapters.types.layers import factors, has_adapter, layers

from .layer import DyLoraVariant, refuse_unfit
from .rank_sampling import ranks_of_step


class RankController:
    """The current rank of one DyLoRA adapter in one model, shared by all of its layers.

    In training, the ranks of the samples of step n depend only on (seed, n), and are the same in the U-Net and in the
    text encoders. They are sampled when the model is called, and restored when the backward pass of that call begins.
    So gradient checkpointing, which calls layers again, uses the same ranks, even if the model was called in between.
    In evaluation, the same rank, `rank`, is used for all samples.

    The layers read the ranks from `gates`, a tensor (samples, components of all layers) that is modified in place, so
    that a compiled model is not recompiled.
    """

    def __init__(
        self,
        adapter_name: str,
        highest: int,
        dylora: DyLora,
        sort_at: float = 0.0,
        rate_power: float = 0.0,
        seed: int = 0,
    ):
        self.adapter_name, self.highest, self.dylora, self.seed = adapter_name, highest, dylora, seed
        self.sort_at, self.rate_power = sort_at, rate_power
        self.rates_of: Any = None  # the optimizer whose steps are scaled by component; see `component_rates`
        self.nested_from: int | None = 0 if sort_at == 0 else None  # the step from which ranks are sampled
        self.unsorted = False  # whether only the full rank has been trained so far, so that components are not sorted
        self.rank = highest
        self.step = 0
        self.batch: tuple[range, int] | None = None  # the samples of this process, and the number in all processes
        self.now = [highest]
        self.drawn = False
        self.variants: list[DyLoraVariant] = []
        self.gates = torch.zeros(1, 0)
        self._settings: dict[int, torch.Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, without the gates, which are recreated, and without the optimizer."""
        return {**self.__dict__, "gates": torch.zeros(0, 0, device=self.gates.device), "rates_of": None}

    @property
    def ranks(self) -> list[int]:
        """The valid ranks, in ascending order."""
        return [*range(self.dylora.unit, self.highest, self.dylora.unit), self.highest]

    @property
    def freezes_lower(self) -> bool:
        """Whether the components below the last unit get no gradient in this call."""
        return self.dylora.freeze_lower and self.drawn and not self.unsorted

    def _is_before_sorting(self) -> bool:
        """Whether this step trains only the full rank; AdapterError if the caller forgot total_steps or the sorting."""
        if self.nested_from is None:
            raise AdapterError(
                f"adapter {self.adapter_name} has sort_at={self.sort_at}, a share of all steps: pass the number of "
                "steps to set_step (total_steps), or use sort_at=0"
            )
        if self.step < self.nested_from:
            return True
        if self.unsorted:
            raise AdapterError(
                f"the components of adapter {self.adapter_name} must be sorted before step {self.nested_from}: call "
                "sort_components with the models and the optimizer"
            )
        return False

    def ranks_of_step(self, rows: int) -> list[int]:
        """The rank for each row of a training batch. A sample may have several rows: windows of a long caption."""
        if self._is_before_sorting():
            return [self.highest]
        samples, total = self.batch or (range(rows), rows)
        if rows % len(samples):
            raise AdapterError(f"the model got a batch of {rows}, but set_step was called for {len(samples)} samples")
        if self.dylora.freeze_lower or self.dylora.rank_sampling == "uniform":
            samples, total = range(1), 1
        sampling, ordered = self.dylora.rank_sampling, self.sort_at > 0
        drawn = ranks_of_step(tuple(self.ranks), sampling, self.seed, self.step, samples, total, ordered)
        return drawn if len(drawn) == 1 else [rank for rank in drawn for _ in range(rows // len(drawn))]

    def set_step(self, step: int, seed: int, samples: range | None, total: int | None) -> None:
        """Set the next step; see the function `set_step`."""
        self.step, self.seed = step, seed
        self.batch = None if samples is None else (samples, len(samples) if total is None else total)

    def set_rank(self, rank: int) -> None:
        """Set the rank for evaluation; AdapterError, which lists the valid ranks, for other ranks."""
        if rank not in self.ranks:
            ranks = self.ranks if len(self.ranks) <= 16 else [*self.ranks[:8], "...", *self.ranks[-2:]]
            raise AdapterError(f"rank {rank} is not one of adapter {self.adapter_name}'s: {', '.join(map(str, ranks))}")
        self.rank = operator.index(rank)
        self.drawn = False
        self._turn([self.rank])

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the model: samples the ranks of this step, or sets the rank for evaluation."""
        if self.adapter_name not in getattr(model, "peft_config", ()) and not any(layers(model, self.adapter_name)):
            detach(model, self.adapter_name)  # another library has deleted the adapter, but not its controller
            return
        training = model.training and torch.is_grad_enabled()
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.ndim > 1)
        samples = next(tensors, None)
        if training or self.drawn:
            self._next(training, 1 if samples is None else len(samples))
        if samples is not None and samples.device != self.gates.device:
            self._move(samples.device)

    def keep(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the model: restores the ranks of this call when its backward pass begins."""
        if self.drawn:
            self._keep(output)

    # Excluded from compilation, since it would be recompiled for every rank and step.
    @torch.compiler.disable
    def _keep(self, output: Any) -> None:
        ranks = list(self.now)

        def back(_: torch.Tensor) -> None:
            if not self.drawn or self.now != ranks:
                self.drawn = True
                self._turn(ranks)

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(back)

    @torch.compiler.disable
    def _next(self, training: bool, rows: int) -> None:
        self.drawn = training
        if training:
            self._turn(self.ranks_of_step(rows))
            self.unsorted = self._is_before_sorting()
            self.step += 1
        else:
            self._turn([self.rank])

    @torch.compiler.disable
    def _move(self, device: torch.device) -> None:
        self._settings = {}
        self._lay_out(len(self.gates), device)
        self._turn(self.now)

    def add(self, variant: DyLoraVariant) -> None:
        """Add a layer; `fill` must be called after the last one."""
        self.variants.append(variant)

    def fill(self) -> None:
        """Recreate the gates after layers or their ranks have changed."""
        self._settings = {}
        if any(variant.gate.numel() != variant.length * len(self.gates) for variant in self.variants):
            self._lay_out(len(self.now), self.gates.device)
        self._turn(self.now)

    def _lay_out(self, rows: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # inference tensors cannot be modified outside of inference mode
            self.gates = torch.zeros(rows, sum(variant.length for variant in self.variants), device=device)
        start = 0
        for variant in self.variants:
            variant.gate = variant.shaped(self.gates[:, start : start + variant.length], 3)  # most inputs are sequences
            start += variant.length

    def _turn(self, ranks: list[int]) -> None:
        self.now = ranks
        for rank in {*ranks} - self._settings.keys():
            values = torch.cat([variant.values(rank) * variant.scaling for variant in self.variants])
            self._settings[rank] = values.to(self.gates.device)
        if len(ranks) != len(self.gates):
            self._lay_out(len(ranks), self.gates.device)
        self.gates.copy_(torch.stack([self._settings[rank] for rank in ranks]))

    def factor(self, rank: int, full: int) -> float:
        """The factor of the scale alpha/full if `rank` of `full` components are used."""
        return (full / rank) ** RANK_SCALINGS[self.dylora.rank_scaling]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a model's output."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


@contextmanager
def cut_to_rank(model: nn.Module, adapter_names: Iterable[str]) -> Iterator[None]:
    """A context in which the components of DyLoRA adapters above the current rank are zero."""
    whole = []
    for name in set(adapter_names):
        for _, layer in layers(model, name):
            variant = layer.lora_variant.get(name)
            if isinstance(variant, DyLoraVariant):
                weight = factors(layer, name).down.weight
                if variant.length != weight.shape[0]:
                    variant.refit(layer, name, weight.shape[0])
                whole.append((weight, weight.data))
                gate = variant.values(variant.controller.rank).to(weight)
                weight.data = weight.data * gate.view(-1, *[1] * (weight.ndim - 1))
    try:
        yield
    finally:
        for weight, data in whole:
            weight.data = data


def attach(model: nn.Module, adapter_name: str, dylora: DyLora, sort_at: float = 0.0, rate_power: float = 0.0) -> None:
    """Make a LoRA adapter in a model a DyLoRA. From then on, each call of the model in training samples a rank.

    If the adapter is already a DyLoRA, its controller is updated to the layers' ranks and set to the highest rank.

    Args:
        model: The model.
        adapter_name: The name of the adapter.
        dylora: Unit, scaling and sampling of ranks.
        sort_at: Share of the training after which components are sorted; 0 never sorts.
        rate_power: See `component_rates`.

    Raises:
        AdapterError: A layer does not support DyLoRA (see `refuse_unfit`); nothing is changed then.
    """
    refuse_unfit(model, adapter_name)
    mine = [layer for _, layer in layers(model, adapter_name)]
    highest = max(layer.r[adapter_name] for layer in mine)
    variants = [layer.lora_variant.get(adapter_name) for layer in mine]
    if variants and all(isinstance(variant, DyLoraVariant) for variant in variants):
        controller = variants[0].controller  # type: ignore[union-attr]
        for layer, variant in zip(mine, variants, strict=True):
            variant.fit(layer, adapter_name)  # type: ignore[union-attr]
        controller.highest, controller.dylora, controller.rank, controller.now = highest, dylora, highest, [highest]
        if sort_at != controller.sort_at:
            controller.sort_at, controller.nested_from = sort_at, 0 if sort_at == 0 else None
        controller.unsorted, controller.rate_power = False, rate_power
        controller.fill()
        return
    controller = RankController(adapter_name, highest, dylora, sort_at, rate_power)
    detach(model, adapter_name)
    for layer in mine:
        layer.lora_variant[adapter_name] = DyLoraVariant(controller, layer, adapter_name)
    controller.fill()
    model.register_forward_pre_hook(controller, with_kwargs=True)
    model.register_forward_hook(controller.keep)


def refit(model: nn.Module) -> None:
    """Adjust the controllers to the current widths and scalings of their layers; the ranks do not change."""
    for controller in controllers(model):
        for _, layer in layers(model, controller.adapter_name):
            layer.lora_variant[controller.adapter_name].fit(layer, controller.adapter_name)
        controller.fill()


def detach(model: nn.Module, adapter_name: str) -> None:
    """Make a DyLoRA adapter a plain LoRA of its full rank again; does nothing for other adapters."""
    for _, layer in lora_layers(model):  # also for a deleted adapter, whose variant old versions of PEFT leave behind
        if isinstance(layer.lora_variant.get(adapter_name), DyLoraVariant):
            del layer.lora_variant[adapter_name]
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, RankController) and hook.adapter_name == adapter_name:
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    for key, hook in list(model._forward_hooks.items()):
        controller = getattr(hook, "__self__", None)
        if isinstance(controller, RankController) and controller.adapter_name == adapter_name:
            del model._forward_hooks[key]


def models_of(target: Any) -> list[nn.Module]:
    """The models of a pipeline, a model, or a list of models."""
    if isinstance(target, nn.Module):
        return [target]
    if hasattr(target, "components"):
        return [part for part in target.components.values() if isinstance(part, nn.Module)]
    if isinstance(target, Iterable):
        return list(target)
    raise TypeError(f"expected a pipeline, a model or a list of models, not {type(target).__name__}")


def controllers(target: Any, adapter_name: str | None = None) -> list[RankController]:
    """The controllers in a pipeline, a model or a list of models, of one adapter or of all."""
    by_id = {}
    for model in models_of(target):
        for _, layer in lora_layers(model):
            for name, variant in layer.lora_variant.items():
                if not (has_adapter(layer, name) and isinstance(variant, DyLoraVariant)):
                    continue
                if adapter_name in (None, name):
                    by_id[id(variant.controller)] = variant.controller
    return list(by_id.values())


def set_rank(target: Any, rank: int, adapter_name: str | None = None) -> None:
    """Set the rank of DyLoRA adapters in live models.

    Args:
        target: A pipeline, a model, or a list of models.
        rank: One of the adapter's ranks: a multiple of its unit, up to its full rank.
        adapter_name: The adapter; None for all DyLoRAs of the target.

    Raises:
        AdapterError: There is no such DyLoRA, the rank is not one of its ranks (the message lists them), or it is fused
            into the weights. Nothing is then changed.

    >>> from lora_adapters import DyLoraConfig, set_rank
    >>> from peft import inject_adapter_in_model
    >>> model = nn.Sequential(nn.Linear(3, 5))
    >>> model = inject_adapter_in_model(DyLoraConfig(r=8, unit=4, target_modules=["0"]), model)
    >>> set_rank(model, 4)
    >>> set_rank(model, 5)
    Traceback (most recent call last):
    lora_adapters.convert.errors.AdapterError: rank 5 is not one of adapter default's: 4, 8
    """
    matching = controllers(target, adapter_name)
    if not matching:
        name = f"{adapter_name} is not a DyLoRA adapter here" if adapter_name else "there is no DyLoRA adapter here"
        raise AdapterError(f"{name}: plain LoRA has one rank; reduce it with Adapter.svd")
    for model in models_of(target):
        for _, layer in lora_layers(model):
            if any(
                isinstance(layer.lora_variant.get(name), DyLoraVariant) and adapter_name in (None, name)
                for name in layer.merged_adapters
            ):
                raise AdapterError(f"{', '.join(layer.merged_adapters)} is fused into the weights: unfuse it first")
    highest = max(controller.highest for controller in matching)
    valid = sorted({valid_rank for controller in matching for valid_rank in controller.ranks})
    for controller in matching:  # the controller of a text encoder or a smaller adapter uses its highest rank instead
        if rank not in controller.ranks and not (rank in valid and rank > controller.highest and rank <= highest):
            controller.set_rank(rank)  # raises
    for controller in matching:
        controller.set_rank(min(rank, controller.highest))


def sorting_step(sort_at: float, total_steps: int) -> int:
    """The step (counted from 0) before which the components are sorted."""
    return round(sort_at * total_steps)


def set_step(
    target: Any,
    step: int,
    seed: int = 0,
    samples: range | None = None,
    total: int | None = None,
    total_steps: int | None = None,
) -> bool:
    """Set the next training step, so that DyLoRA samples the ranks of this step when the models are called.

    Without it, each controller counts its model's training calls from 0, which is equivalent if every model is called
    once per step. A training loop that resumes or calls a model several times per step must call this before each call.

    Args:
        target: A pipeline, a model, or a list of models.
        step: The number of optimizer steps done so far.
        seed: The seed of the training run.
        samples: In data-parallel training, the indices of the samples of the batch that this process has. If a model is
            called with a multiple of their number, each sample has that many consecutive rows.
        total: The number of samples in all processes.
        total_steps: The number of steps of the whole training run; adapters with sort_at require it.

    Returns:
        Whether to call `sort_components`, with the optimizer, before this step.

    Raises:
        AdapterError: samples and total do not match, or `scale_component_rates` was not called for a rate_power.
    """
    if samples is None and total is not None:
        raise AdapterError("total, the number of samples in all processes, requires samples, those of this process")
    if samples is not None and not (len(samples) and min(samples) >= 0 and max(samples) < (total or max(samples) + 1)):
        raise AdapterError(f"samples {samples} are not in a batch of {total}, which is numbered from 0")
    matching = controllers(target)
    for controller in matching:
        if controller.rate_power and controller.rates_of is None:
            raise AdapterError(
                f"rate_power={controller.rate_power} changes the optimizer's steps of adapter "
                f"{controller.adapter_name}: call scale_component_rates(models, optimizer) before training"
            )
        if total_steps is not None:
            controller.nested_from = sorting_step(controller.sort_at, total_steps)
        controller.set_step(step, seed, samples, total)
    return any(controller.sort_at > 0 and controller.nested_from == step for controller in matching)
