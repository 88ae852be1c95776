"""What a file of an adapter holds, whatever its format."""

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
    """The value that occurs most often, the first of several; None if there are none."""
    return next((value for value, _ in Counter(values).most_common(1)), None)


class Stored(NamedTuple):
    """A module as its file has it: the tensors by the ends of their keys, and the change that was read from them.

    As long as an adapter has this very change, its tensors can be written as they were.
    """

    change: Delta
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Contents:
    """Changes of modules, the metadata of their file (all strings), and what the file has beside them.

    embeddings: of tokens, by the ends of their keys (`bundle_emb.<token>...`). stored: modules as the file has them.
    """

    modules: Mapping[ModuleName, Delta]
    metadata: Mapping[str, str] = field(default_factory=dict)
    embeddings: Mapping[str, torch.Tensor] = field(default_factory=dict, kw_only=True)
    stored: Mapping[ModuleName, Stored] = field(default_factory=dict, kw_only=True)

    @property
    def family(self) -> ModelFamily:
        """The family of base models that it is for, recognised by module names, metadata and widths."""
        return self.candidates[0]

    @property
    def candidates(self) -> tuple[ModelFamily, ...]:
        """The family, and others behind it that it may be for as well, since they have layers of the same names."""
        return candidates_of(self.modules, self.metadata)

    @property
    def naming_family(self) -> ModelFamily:
        """The family whose names its modules have in kohya's files.

        Raises:
            AdapterError: It may be for families that have other names there.
        """
        family, *others = self.candidates
        for other in others:
            apart = (module for module in self.modules if family.kohya_name(module) != other.kohya_name(module))
            if (module := next(apart, None)) is not None:
                titles = " or ".join(each.title for each in (family, *others))
                raise AdapterError(
                    f"{module} is a layer of several models ({titles}) and has another name in the files of each: "
                    f"say which it is for (--base_model {other.name}; in Python Adapter.load(..., base_model=...))"
                )
        return family

    @property
    def architecture(self) -> str:
        """The name of its family: "sd" (SD1.x, SD2.x) or "sdxl"."""
        return self.family.name

    @property
    def components(self) -> tuple[str, ...]:
        """The components that it has modules of."""
        return tuple(dict.fromkeys(module.component for module in self.modules))

    @property
    def rank(self) -> int:
        """The rank (number of components) that most of its modules have; 0 if none has one."""
        return most_common(change.rank for change in self.modules.values() if change.rank is not None) or 0

    @property
    def kinds(self) -> dict[str, int]:
        """How many modules are of each kind (LoRA, LoHa, DoRA, norm, ...), the most common first."""
        counts = Counter(change.kind for change in self.modules.values())
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    @property
    def has_only_pairs(self) -> bool:
        """Whether all of its changes are low-rank pairs, or are so in another form; see `pairs`."""
        return all(as_pair(change) is not None for change in self.modules.values())

    @property
    def dylora(self) -> DyLora | None:
        """Unit and rank scaling where the metadata says that it is a DyLoRA, else None."""
        return dylora_of(self.metadata)

    def replaced(self, **fields: Any) -> Self:
        """The same with other modules, metadata, embeddings or stored ones."""
        return replace(self, **fields)

    def pairs(self) -> dict[ModuleName, LowRank]:
        """The modules as low-rank pairs.

        Returns:
            The pairs by module.

        Raises:
            AdapterError: A change is of another kind; the message has the module, the kind, and how to convert it.
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
            modelspec: Include the entries that begin with modelspec.

        Returns:
            The entries.
        """
        alpha = most_common(alpha for change in self.modules.values() if (alpha := alpha_in(change)) is not None) or 0.0
        metadata = complete(self.metadata, self.candidates, self.rank, alpha)
        return {key: text for key, text in metadata.items() if modelspec or not key.startswith("modelspec.")}


class WriteOptions(NamedTuple):
    """How a file is written. dtype: None keeps each tensor's own. tokens: embeddings for cloneofsimo's format."""

    dtype: torch.dtype | None = None
    modelspec: bool = True
    tokens: Mapping[str, torch.Tensor] = {}


class Format(Protocol):
    """A format of files: one module of this package, with a line in `registry.FORMATS`.

    NAME: as users choose it.
    """

    NAME: str

    def matches(self, keys: Collection[str]) -> bool:
        """Whether these are the keys of such a file."""

    def read(
        self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], lookup: Lookup | None = None
    ) -> Contents:
        """What a file with these tensors holds; AdapterError if it is damaged. lookup: as in `names`."""

    def write(self, path: Path, contents: Contents, options: WriteOptions) -> None:
        """Write a file, whole or not at all; AdapterError if the format cannot hold it."""
