"""The rank controller of a DyLoRA, which holds its current rank; attaching and detaching it."""

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
    """The rank that one DyLoRA adapter works at in one model, shared by all of its layers.

    In training the ranks of step n's samples are a function of (seed, n) alone, the same in the U-Net and in the text
    encoders. They are drawn when the model is called, not when a layer is, and come back when the gradient of that call
    begins, so that gradient checkpointing, which calls layers again, computes with the same ranks again, whatever the
    model was called for in between. In evaluation there is one, `rank`.

    The layers see the ranks as numbers in `gates`, a tensor (samples, components of all layers) that is changed in
    place: a compiled model follows without being compiled again.
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
        self.rates_of: Any = None  # the optimizer whose steps are scaled by component, see `component_rates`
        self.nested_from: int | None = 0 if sort_at == 0 else None  # the step from which ranks are drawn
        self.unsorted = False  # whether the full rank alone has been trained, and the components are in no order yet
        self.rank = highest
        self.step = 0
        self.batch: tuple[range, int] | None = None  # the samples that are here, of how many in all processes
        self.now = [highest]
        self.drawn = False
        self.variants: list[DyLoraVariant] = []
        self.gates = torch.zeros(1, 0)
        self._settings: dict[int, torch.Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the gates are laid out anew, and the optimizer is not that of the copy."""
        return {**self.__dict__, "gates": torch.zeros(0, 0, device=self.gates.device), "rates_of": None}

    @property
    def ranks(self) -> list[int]:
        """The ranks that it can be set to, in order."""
        return [*range(self.dylora.unit, self.highest, self.dylora.unit), self.highest]

    @property
    def freezes_lower(self) -> bool:
        """Whether the components below the last unit are to get no gradient now."""
        return self.dylora.freeze_lower and self.drawn and not self.unsorted

    def _is_before_sorting(self) -> bool:
        """Whether this step trains the full rank alone; AdapterError where that, or the sorting, has been left out."""
        if self.nested_from is None:
            raise AdapterError(
                f"sort_at={self.sort_at} is a share of the training of adapter {self.adapter_name}: give set_step the "
                "number of all steps (total_steps), or take sort_at=0"
            )
        if self.step < self.nested_from:
            return True
        if self.unsorted:
            raise AdapterError(
                f"the components of adapter {self.adapter_name} are to be sorted before step {self.nested_from}: call "
                "sort_components with the models and the optimizer"
            )
        return False

    def ranks_of_step(self, rows: int) -> list[int]:
        """The rank for each row of a training batch. A sample may have several rows: windows of a long caption."""
        if self._is_before_sorting():
            return [self.highest]
        samples, total = self.batch or (range(rows), rows)
        if rows % len(samples):
            raise AdapterError(f"a batch of {rows} came where one of {len(samples)} was announced to the DyLoRA")
        if self.dylora.freeze_lower or self.dylora.rank_sampling == "uniform":
            samples, total = range(1), 1
        sampling, ordered = self.dylora.rank_sampling, self.sort_at > 0
        drawn = ranks_of_step(tuple(self.ranks), sampling, self.seed, self.step, samples, total, ordered)
        return drawn if len(drawn) == 1 else [rank for rank in drawn for _ in range(rows // len(drawn))]

    def set_step(self, step: int, seed: int, samples: range | None, total: int | None) -> None:
        """What comes next; see the function `set_step`."""
        self.step, self.seed = step, seed
        self.batch = None if samples is None else (samples, len(samples) if total is None else total)

    def set_rank(self, rank: int) -> None:
        """The rank for evaluation; AdapterError, with the valid ones, where it is none of `ranks`."""
        if rank not in self.ranks:
            ranks = self.ranks if len(self.ranks) <= 16 else [*self.ranks[:8], "...", *self.ranks[-2:]]
            raise AdapterError(f"rank {rank} is not one of adapter {self.adapter_name}'s: {', '.join(map(str, ranks))}")
        self.rank = operator.index(rank)
        self.drawn = False
        self._turn([self.rank])

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the model: draws the ranks of this step, or goes back to that of evaluation."""
        if self.adapter_name not in getattr(model, "peft_config", ()) and not any(layers(model, self.adapter_name)):
            detach(model, self.adapter_name)  # the adapter has been deleted by a library that knows no controllers
            return
        training = model.training and torch.is_grad_enabled()
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.ndim > 1)
        samples = next(tensors, None)
        if training or self.drawn:
            self._next(training, 1 if samples is None else len(samples))
        if samples is not None and samples.device != self.gates.device:
            self._move(samples.device)

    def keep(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the model: the ranks of this call come back when the gradient of its output arrives."""
        if self.drawn:
            self._keep(output)

    # Nothing of this is for a compiler to look into: it would compile anew for every rank and step.
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
        """Take a layer in; `fill` is to be called when all are in."""
        self.variants.append(variant)

    def fill(self) -> None:
        """Lay the gates out anew, after layers or their ranks have changed."""
        self._settings = {}
        if any(variant.gate.numel() != variant.length * len(self.gates) for variant in self.variants):
            self._lay_out(len(self.now), self.gates.device)
        self._turn(self.now)

    def _lay_out(self, rows: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # tensors made in that mode could not be changed outside of it
            self.gates = torch.zeros(rows, sum(variant.length for variant in self.variants), device=device)
        start = 0
        for variant in self.variants:
            variant.gate = variant.shaped(self.gates[:, start : start + variant.length], 3)  # most layers see sequences
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
        """What the scale alpha/full is multiplied with when `rank` of `full` components are used."""
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
    """In the block, the components of the DyLoRAs among the adapters that are above the current rank are zero."""
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
    """Make a LoRA adapter in a model a DyLoRA. From then on the model draws a rank whenever it is called in training.

    If it is a DyLoRA already, its controller stays, with the present ranks of the layers, at the highest rank.

    Args:
        model: The model.
        adapter_name: The name of the adapter.
        dylora: Unit, scaling and sampling of ranks.
        sort_at: Share of the training after which components are sorted; 0 never sorts.
        rate_power: See `component_rates`.

    Raises:
        AdapterError: A layer computes the adapter in another way (see `refuse_unfit`); nothing is changed.
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
    """Adjust the controllers to the present widths and scalings of their layers; the ranks stay as they are."""
    for controller in controllers(model):
        for _, layer in layers(model, controller.adapter_name):
            layer.lora_variant[controller.adapter_name].fit(layer, controller.adapter_name)
        controller.fill()


def detach(model: nn.Module, adapter_name: str) -> None:
    """Make a DyLoRA adapter a plain LoRA of its full rank again (as far as it is one)."""
    for _, layer in lora_layers(model):  # also of a deleted adapter of this name: old PEFT leaves its variant there
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
        raise AdapterError(f"{name}: plain LoRA has one rank; cut it with Adapter.svd")
    for model in models_of(target):
        for _, layer in lora_layers(model):
            if any(
                isinstance(layer.lora_variant.get(name), DyLoraVariant) and adapter_name in (None, name)
                for name in layer.merged_adapters
            ):
                raise AdapterError(f"{', '.join(layer.merged_adapters)} is fused into the weights: unfuse it first")
    highest = max(controller.highest for controller in matching)
    valid = sorted({valid_rank for controller in matching for valid_rank in controller.ranks})
    for controller in matching:  # a text encoder's or a smaller adapter's controller stops at its own highest rank
        if rank not in controller.ranks and not (rank in valid and rank > controller.highest and rank <= highest):
            controller.set_rank(rank)  # raises
    for controller in matching:
        controller.set_rank(min(rank, controller.highest))


def sorting_step(sort_at: float, total_steps: int) -> int:
    """The step, of so many from 0 on, before which the components are sorted."""
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
        raise AdapterError("total is the number of samples in all processes: give samples, those of this one, too")
    if samples is not None and not (len(samples) and min(samples) >= 0 and max(samples) < (total or max(samples) + 1)):
        raise AdapterError(f"samples {samples} are none of a batch of {total}: they are numbered from 0")
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
