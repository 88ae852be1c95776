"""The contents of an adapter file, independent of its format."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from typing_extensions import Self

from lora_adapters.convert.deltas.base import Delta, alpha_in
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.deltas.sum import as_pair, pair_of
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.detection import candidates_of
from lora_adapters.convert.families.family import ModelFamily
from lora_adapters.convert.families.names import Lookup, ModuleName

from .metadata import DyLora, complete, dylora_of

T = TypeVar("T")


def most_common(values: Iterable[T]) -> T | None:
    """The most frequent value, the first one if tied; None if there are no values."""
    return next((value for value, _ in Counter(values).most_common(1)), None)


class Stored(NamedTuple):
    """A module as stored in its file: the tensors by the suffix of their key, and the change that was read from them.

    While an adapter contains this same change object, the tensors can be written back unchanged.
    """

    change: Delta
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Contents:
    """The contents of an adapter file.

    Attributes:
        modules: The change of each module.
        metadata: The metadata of the file.
        embeddings: Token embeddings, by the part of their key after `bundle_emb.`.
        stored: The modules as they are stored in the file, to write them back unchanged.
    """

    modules: Mapping[ModuleName, Delta]
    metadata: Mapping[str, str] = field(default_factory=dict)
    embeddings: Mapping[str, torch.Tensor] = field(default_factory=dict, kw_only=True)
    stored: Mapping[ModuleName, Stored] = field(default_factory=dict, kw_only=True)

    @property
    def family(self) -> ModelFamily:
        """The family of base models, recognised by module names, metadata and widths."""
        return self.candidates[0]

    @property
    def candidates(self) -> tuple[ModelFamily, ...]:
        """All families that the adapter may be for, the most likely first: several have the same layer names."""
        return candidates_of(self.modules, self.metadata)

    @property
    def naming_family(self) -> ModelFamily:
        """The family that determines the module names in kohya's files.

        Raises:
            AdapterError: Several families are possible, and their names differ.
        """
        family, *others = self.candidates
        for other in others:
            apart = (module for module in self.modules if family.kohya_name(module) != other.kohya_name(module))
            if (module := next(apart, None)) is not None:
                titles = " or ".join(each.title for each in (family, *others))
                raise AdapterError(
                    f"{module} is a layer of several models ({titles}), each of which uses another name in its files: "
                    f"choose the model (--base_model {other.name}; in Python Adapter.load(..., base_model=...))"
                )
        return family

    @property
    def architecture(self) -> str:
        """The name of the family, such as "sd" (SD1.x, SD2.x) or "sdxl"."""
        return self.family.name

    @property
    def components(self) -> tuple[str, ...]:
        """The components that have adapted modules."""
        return tuple(dict.fromkeys(module.component for module in self.modules))

    @property
    def rank(self) -> int:
        """The rank of most modules; 0 if no module has a rank."""
        return most_common(change.rank for change in self.modules.values() if change.rank is not None) or 0

    @property
    def kinds(self) -> dict[str, int]:
        """The number of modules of each kind (LoRA, LoHa, DoRA, norm, ...), the most common first."""
        counts = Counter(change.kind for change in self.modules.values())
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    @property
    def has_only_pairs(self) -> bool:
        """Whether all changes can be expressed exactly as low-rank pairs; see `pairs`."""
        return all(as_pair(change) is not None for change in self.modules.values())

    @property
    def dylora(self) -> DyLora | None:
        """The DyLoRA options in the metadata; None for other adapters."""
        return dylora_of(self.metadata)

    def replaced(self, **fields: Any) -> Self:
        """A copy with other values of the given fields."""
        return replace(self, **fields)

    def pairs(self) -> dict[ModuleName, LowRank]:
        """The modules as low-rank pairs.

        Returns:
            The pairs by module.

        Raises:
            AdapterError: A change is of another kind; the message names the module, the kind, and how to convert it.
        """
        pairs = {}
        for module, change in self.modules.items():
            try:
                pairs[module] = pair_of(change)
            except AdapterError as error:
                raise AdapterError(f"{module}: {error}") from None
        return pairs

    def full_metadata(self, modelspec: bool = True) -> dict[str, str]:
        """The metadata with all entries that readers of kohya's files expect, except for the hashes.

        Args:
            modelspec: Include the entries whose keys begin with `modelspec.`.

        Returns:
            The entries.
        """
        alpha = most_common(alpha for change in self.modules.values() if (alpha := alpha_in(change)) is not None) or 0.0
        metadata = complete(self.metadata, self.candidates, self.rank, alpha)
        return {key: text for key, text in metadata.items() if modelspec or not key.startswith("modelspec.")}


class WriteOptions(NamedTuple):
    """Options of writing: `dtype` (None keeps each tensor's); `modelspec` entries; `tokens` for cloneofsimo's files."""

    dtype: torch.dtype | None = None
    modelspec: bool = True
    tokens: Mapping[str, torch.Tensor] = {}


class Format(Protocol):
    """A file format: a module of this package that is listed in `registry.FORMATS`. Users choose it by its NAME."""

    NAME: str

    def matches(self, keys: Collection[str]) -> bool:
        """Whether these are the keys of a file in this format."""

    def read(
        self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], lookup: Lookup | None = None
    ) -> Contents:
        """Read the contents of a file; AdapterError if it is damaged. `lookup`: see `families.names`."""

    def write(self, path: Path, contents: Contents, options: WriteOptions) -> None:
        """Write a file atomically; AdapterError if the format cannot store the contents."""
