"""Loading adapters for the programs: ambiguous or damaged files are refused with a message that names the file."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.deltas.reduction import weights_only
from lora_adapters.convert.errors import AdapterError, UnknownModuleError
from lora_adapters.convert.families.kohya_names import from_kohya
from lora_adapters.convert.families.registry import by_name, titles
from lora_adapters.convert.formats import kohya
from lora_adapters.convert.models.finite import check_finite
from lora_adapters.convert.storage.files import read_tensors
from lora_adapters.convert.storage.sources import locate

from .base_weights import BaseWeights
from .command_line import report_left_out


def load(
    model: str | Path, zero_alpha: str | None = None, skip_unknown: bool = False, base_model: str | None = None
) -> Adapter:
    """Load an adapter for a program, and check that its values are finite.

    Args:
        model: A file, a PEFT folder or a Hub repository.
        zero_alpha: The meaning of an alpha of 0: alpha = rank ("rank") or no effect ("none"). None raises an error for
            it, since programs disagree.
        skip_unknown: Whether to leave out modules that no known model has; they are listed on stdout.
        base_model: The family of the base model; None recognises it from the file.

    Returns:
        The adapter.

    Raises:
        AdapterError: The adapter cannot be read, or has values that are not finite; the message begins with the file.
    """
    path, family = locate(model), None if base_model is None else by_name(base_model)
    if path.is_dir():
        adapter, zeros = Adapter.load(path), []
    else:
        tensors, metadata = read_tensors(path)
        if skip_unknown:
            tensors, unknown = without_unknown(tensors, metadata)
            report_left_out(str(path), unknown, f"{titles()} do not have")
        try:
            adapter, zeros = Adapter.from_tensors(tensors, metadata, family=family), zero_alphas(tensors)
        except AdapterError as error:
            raise type(error)(f"{path}: {error}") from None
    if family is not None:
        try:
            adapter = adapter.made_for(family)
        except AdapterError as error:
            raise AdapterError(f"--base_model {base_model}: {path}: {error}") from None
    if zeros and zero_alpha is None:
        raise AdapterError(
            f"{path}: the alpha of {zeros[0]} is 0, which means alpha = rank in kohya's trainer and no effect in other "
            "programs: choose one with `lora-adapters convert --zero_alpha rank` (or none)"
        )
    check_finite(adapter.modules, f"{path}: ")
    if zeros and zero_alpha == "none":
        silent = {from_kohya(name) for name in zeros}
        pairs = {
            module: change.scaled(0.0) if module in silent else change for module, change in adapter.modules.items()
        }
        return adapter.with_modules(pairs)
    return adapter


def weights_alone(adapter: Adapter, name: str, base: BaseWeights | None = None) -> Adapter:
    """Remove changes of norms and biases, which low-rank pairs cannot represent.

    Args:
        adapter: The adapter.
        name: Its name in messages. The removed changes are listed on stdout.
        base: The model's weights, if known: with them, changes that scale biases are removed and listed too.

    Returns:
        The adapter; the same object if nothing is removed.

    Raises:
        AdapterError: The adapter changes only norms and biases.
    """
    kept, left_out = weights_only((adapter if base is None else base.with_biases(adapter)).modules)
    report_left_out(name, left_out, "low-rank pairs cannot represent")
    if not kept:
        raise AdapterError(f"{name} changes only norms and biases, which low-rank pairs cannot represent")
    return adapter.with_modules(kept)


_ANOTHER_MODELS = 20  # if the first modules are all unknown, this many mean that the adapter is for an unknown model
_MODULE_END = re.compile(
    r"\.(lora_|lora[.]|alpha$|dora_scale$|diff|processor\.|hada_|lokr_|oft_|rescale$|scalar$|[wb]_norm$|on_input$"
    r"|weight$|[ab][12]\.weight$|bm\.weight$)|_lora\.|\.lora$"
)


def without_unknown(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Split off the tensors of modules that no known model has.

    Args:
        tensors: The file's tensors.
        metadata: The file's metadata.

    Returns:
        The other tensors, and the names of the unknown modules. If the adapter seems to be for an unknown model, all
        tensors and no names.
    """
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _MODULE_END.search(key)
        groups.setdefault(key[: match.start()] if match else key, {})[key] = tensor
    kept: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    for name, group in groups.items():
        try:
            Adapter.from_tensors(group, metadata)
        except AdapterError as error:
            if isinstance(error, UnknownModuleError) or isinstance(error.__cause__, UnknownModuleError):
                unknown.append(name)
                if len(unknown) == _ANOTHER_MODELS and not kept:  # reading all tensors raises a better error
                    return dict(tensors), []
                continue
        kept |= group  # other errors are raised when all tensors are read
    return kept, unknown


def zero_alphas(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """kohya's names of the modules whose alpha is 0."""
    if not kohya.matches(tensors):
        return []
    alphas = ((name, tensor) for name, tensor in tensors.items() if name.endswith(".alpha"))
    return [name.removesuffix(".alpha") for name, tensor in alphas if tensor.numel() == 1 and float(tensor) == 0]
