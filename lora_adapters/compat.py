"""Helpers for differences between the supported versions of peft, diffusers and transformers.

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
        reason: What is wrong with the installed version, as the end of the sentence.

    Returns:
        The error for the caller to raise.
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
        ImportError: The package is older; the message names the supported versions.
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
    """Whether `from_pretrained` of pipelines supports `disable_mmap`; older versions ignore it."""
    return Version(version("diffusers")) >= Version("0.37")


def checkpoint_activations(model: Any) -> None:
    """Enable gradient checkpointing of a transformers model, with the method of its version."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # otherwise frozen embeddings stop the gradient


def rank_stabilized(layer: Any) -> dict[str, bool]:
    """The adapters of a PEFT layer for which `set_adapters` uses the scale alpha/sqrt(r).

    Args:
        layer: A LoRA layer.

    Returns:
        Whether this is so, by adapter name. Empty for layers of PEFT 0.17, which always uses alpha/r.
    """
    return getattr(layer, "use_rslora", {})
