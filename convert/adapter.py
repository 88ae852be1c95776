"""`Adapter`: an adapter as data, with methods to read, combine and write it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Self

from lora_adapters.convert.deltas.low_rank import rank_range
from lora_adapters.convert.families.family import ModelFamily
from lora_adapters.convert.families.names import Lookup
from lora_adapters.convert.families.registry import BASE_VERSION, by_metadata, by_name
from lora_adapters.convert.families.unlisted import UNLISTED
from lora_adapters.convert.formats import peft, registry
from lora_adapters.convert.formats.contents import Contents, WriteOptions
from lora_adapters.convert.formats.metadata import dylora_of
from lora_adapters.convert.storage.files import read_tensors
from lora_adapters.convert.storage.sources import locate

from .arithmetic import Arithmetic
from .errors import AdapterError
from .live import LiveAdapter


@dataclass(frozen=True, eq=False, repr=False)
class Adapter(Arithmetic, LiveAdapter):
    """An adapter: the weight change of each module, and the metadata of its file.

    It is immutable: arithmetic returns new adapters. The tensors of a loaded adapter are views of the memory-mapped
    file until they are used.

    Args:
        modules: The change of each module, `{ModuleName(component, path): change}`: low-rank pairs (`LowRank`) or
            other types (see `deltas.Delta`).
        metadata: The metadata of the file; all values are strings.
        embeddings: Token embeddings stored in the same file, by the end of their key.
        stored: The tensors of each module as they are in the file, so that they can be written unchanged.

    Raises:
        AdapterError: The metadata declare a DyLoRA with an unknown rank_scaling.

    >>> from lora_adapters.convert import LowRank, ModuleName
    >>> to_q = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    >>> a = Adapter({to_q: LowRank(torch.ones(4, 8), torch.ones(8, 4), alpha=4.0)})
    >>> a.architecture, a.components, a + a.scale(0.5)
    ('sd', ('unet',), Adapter(1 modules of unet, rank 8))
    >>> Adapter.load(a.save("a.safetensors")).metadata["ss_network_dim"]
    '4'
    """

    def __post_init__(self) -> None:
        dylora_of(self.metadata)  # invalid DyLoRA metadata is an error here, not after a file has been written

    # --- files ---------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        base_model: str | None = None,
        **hub: Any,
    ) -> Self:
        """Read an adapter from a file, a folder or a Hub repository, in any of FORMATS.

        Args:
            source: A file, a folder, or a repository (owner/name).
            weight_name: The file in the folder or repository, if there are several.
            subfolder: The subfolder of the folder or repository.
            base_model: The base model, if it cannot be detected from the file: "flux", "chroma", "sd3", "qwen_image",
                ...; "other" for any other model. The layer names are then kept as they are in the file, and the
                adapter can only be saved with these names.
            **hub: Options of `huggingface_hub`: token, revision, cache_dir, local_files_only, ...

        Returns:
            The adapter.

        Raises:
            AdapterError: The source is missing, damaged, or in another format; the message names the file.
        """
        path = locate(source, weight_name=weight_name, subfolder=subfolder, **hub)
        if base_model is None:
            return cls.from_path(path)
        family = by_name(base_model)
        return cls.from_path(path, family=family).made_for(family)

    @classmethod
    def from_path(cls, path: Path, lookup: Lookup | None = None, family: ModelFamily | None = None) -> Self:
        """Read an adapter from a local file or PEFT folder.

        Args:
            path: The file or folder.
            lookup: As in `from_tensors`.
            family: As in `from_tensors`.

        Returns:
            The adapter.

        Raises:
            AdapterError: As for `from_tensors`; the message names the path.
        """
        weights = (peft.WEIGHTS, peft.WEIGHTS_PICKLED)
        if path.name in weights and (path.parent / peft.CONFIG).is_file():
            path = path.parent  # the file alone contains neither alphas nor the component
        if path.is_dir():
            return cls._of(peft.read_folder(path, lookup))
        tensors, metadata = read_tensors(path)
        try:
            return cls.from_tensors(tensors, metadata, lookup, family)
        except AdapterError as error:
            raise type(error)(f"{path}: {error}") from None

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str] | None = None,
        lookup: Lookup | None = None,
        family: ModelFamily | None = None,
    ) -> Self:
        """Read an adapter from a state dict in kohya's, LyCORIS', cloneofsimo's or one of diffusers' formats.

        Args:
            tensors: The state dict. The tensors are not copied; an alpha may be a plain number.
            metadata: The metadata of the file; all values are strings.
            lookup: A function that finds modules of a live model. It is called with a component and a name that no
                known model has, and returns the module's path.
            family: The family of the base model; None detects it from the tensors.

        Returns:
            The adapter.

        Raises:
            UnknownFormatError: The type of adapter is not supported.
            AdapterError: Keys or modules are unknown, one half of a pair is missing, or shapes do not match.
        """
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            tensors = {key: _as_tensor(key, value) for key, value in tensors.items()}
        return cls._of(registry.read(tensors, dict(metadata or {}), lookup, family))

    @classmethod
    def _of(cls, contents: Contents) -> Self:
        return cls(contents.modules, contents.metadata, embeddings=contents.embeddings, stored=contents.stored)

    def save(
        self,
        path: str | Path,
        format: str | None = None,
        dtype: torch.dtype | None = None,
        fold_alpha: bool = False,
        embeddings: Mapping[str, torch.Tensor] | None = None,
        modelspec: bool = True,
    ) -> Path:
        """Write the adapter. If writing fails, no partial file is left.

        Args:
            path: The file, or the folder for "peft". Any suffix but .safetensors writes a PyTorch pickle file.
            format: "kohya" (which A1111 and ComfyUI read too), "diffusers" (alphas folded into the weights), "peft",
                "lycoris" (any kind of change), or "cloneofsimo" (the positional format of cloneofsimo/lora, for SD1.x
                and SD2.x). None is "kohya", or "lycoris" if some changes are not low-rank pairs.
            dtype: The dtype of the weights; None keeps each tensor's own.
            fold_alpha: Whether to write the most common alpha in all modules and scale `up` accordingly. Without this
                package, diffusers reads alphas that differ between modules incorrectly.
            embeddings: Token embeddings to write into the same file, by token; "cloneofsimo" only.
            modelspec: Whether to add modelspec metadata to kohya's own.

        Returns:
            The path.

        Raises:
            AdapterError: The adapter has no modules, or the path cannot be written. An existing file is then
                unchanged.
        """
        chosen = registry.to_write(format, self)
        if not self.modules:
            raise AdapterError(f"{path} is not written: the adapter has no modules")
        path = Path(path).expanduser()
        adapter = self.with_common_alpha() if fold_alpha else self
        chosen.write(path, adapter, WriteOptions(dtype, modelspec, embeddings or {}))
        return path

    def made_for(self, family: ModelFamily) -> Self:
        """The adapter, with metadata that declare a family as its base model.

        Args:
            family: The family.

        Returns:
            The adapter; the same object if its metadata already declare the family.

        Raises:
            AdapterError: The family lacks a module, or the metadata name another family.
        """
        if family is UNLISTED and family.has(self.modules):
            return self  # the metadata do not matter
        stated = by_metadata(self.metadata) if self.metadata.get(BASE_VERSION) else None
        if stated is not None and stated is not family:
            raise AdapterError(f"the metadata say that the adapter is for {stated.title}, not {family.title}")
        strange = next((module for module in self.modules if not family.has([module])), None)
        if strange is not None:
            raise AdapterError(f"{strange} is not a module of {family.title}")
        if stated is family:
            return self
        return self.replaced(metadata={**self.metadata, BASE_VERSION: family.stated})

    # --- what it is ------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        kind = f", DyLoRA unit {self.dylora.unit}" if self.dylora else ""
        ranks = rank_range(change.rank for change in self.modules.values() if change.rank is not None)
        if set(self.kinds) - {"LoRA"}:
            kind = f", {', '.join(self.kinds)}"
        return f"Adapter({len(self.modules)} modules of {', '.join(self.components)}, rank {ranks}{kind})"

    # --- models ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_difference(
        cls, base: str | Path, tuned: str | Path, rank: int, conv_rank: int | None = None, **options: Any
    ) -> Self:
        """Extract the best adapter of a given rank from the difference between two models, tuned - base.

        Args:
            base: The base model: a checkpoint file or a Diffusers folder.
            tuned: The fine-tuned model: a checkpoint file or a Diffusers folder.
            rank: The rank of linear layers and 1x1 convolutions.
            conv_rank: The rank of larger convolutions (LoRA-C3Lier); None skips them (LoRA-LierLa).
            **options: target_error, min_diff, clamp_quantile, device, v_prediction: see
                `lora_adapters.convert.models.extraction.approximate_difference`.

        Returns:
            The adapter.

        Raises:
            AdapterError: The models are of different families, or equal.
        """
        from lora_adapters.convert.models.extraction import approximate_difference

        difference = approximate_difference(base, tuned, rank, conv_rank, **options)
        return cls(difference.modules, difference.metadata)

    def merge_into(self, model: str | Path, out: str | Path, weight: float = 1.0) -> Path:
        """Merge the adapter into a model: write the model with weight · ΔW added to its weights.

        Tensors without an adapter are copied bit for bit; the others keep their dtype.

        Args:
            model: A checkpoint file or a Diffusers folder.
            out: The file or folder to write.
            weight: The factor of the change.

        Returns:
            The path of the result.

        Raises:
            AdapterError: The adapter is for another model. Nothing is then written.
        """
        from lora_adapters.convert.models.merging import merge_into_model

        return merge_into_model(model, out, [self], [weight])


def _as_tensor(key: str, value: Any) -> torch.Tensor:
    """Convert a value of a state dict, which may be a number or an array, to a tensor."""
    try:
        return value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise AdapterError(f"{key!s:.80} is of the type {type(value).__name__}, not a tensor") from None
