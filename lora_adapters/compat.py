"""What differs between the supported versions of peft, diffusers and transformers, under one name each.

Nothing slow is imported here.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

OLDEST = {"peft": "0.17.1", "diffusers": "0.35.2", "transformers": "4.57.1"}  # as in tests/noxfile.py


def unfit(package: str, reason: str) -> ImportError:
    """The error for an unsupported version of a package.

    Args:
        package: The package, one of `OLDEST`.
        reason: What the installed version lacks or does; the end of the message.

    Returns:
        The error, to be raised.
    """
    try:
        installed = version(package)
    except PackageNotFoundError:
        installed = "(no version found)"
    return ImportError(f"lora_adapters requires {package}>={OLDEST[package]}; {package} {installed} {reason}")


def check_age(package: str) -> None:
    """Check that a package is not older than the oldest version that is tested.

    Args:
        package: The package, one of `OLDEST`.

    Raises:
        ImportError: It is older; the message names the versions that fit.
    """
    if Version(version(package)) < Version(OLDEST[package]):
        raise unfit(package, "is too old")


def dtype_option(dtype: Any) -> dict[str, Any]:
    """The keyword argument for the dtype of `from_pretrained` and `from_single_file` in the installed diffusers.

    diffusers ignores unknown keyword arguments, so a wrong name would have no effect.

    Args:
        dtype: A torch dtype, or None.

    Returns:
        {name: dtype}.
    """
    return {"dtype" if Version(version("diffusers")) >= Version("0.40") else "torch_dtype": dtype}


def pipelines_can_avoid_mmap() -> bool:
    """Whether a pipeline's `from_pretrained` knows `disable_mmap`; before, it is ignored."""
    return Version(version("diffusers")) >= Version("0.37")


def checkpoint_activations(model: Any) -> None:
    """Recompute a transformers model's activations in the backward pass, under the name that its version has."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # else frozen embeddings stop the gradient


def rank_stabilized(layer: Any) -> dict[str, bool]:
    """The adapters of a PEFT layer whose scale is alpha/sqrt(r) when `set_adapters` sets it again.

    Args:
        layer: A LoRA layer.

    Returns:
        Whether, by the name of the adapter. Empty for layers of PEFT 0.17, which always set alpha/r.
    """
    return getattr(layer, "use_rslora", {})
