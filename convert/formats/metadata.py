"""The metadata that kohya's trainer writes and other programs read: ss_*, sshs_* and modelspec.*."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lora_adapters.convert.deltas.low_rank import RANK_SAMPLINGS, RANK_SCALINGS
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.family import ModelFamily
from lora_adapters.convert.families.registry import BASE_VERSION, is_v2, version_named
from lora_adapters.convert.parsing import json_table, json_value

_HASHES = ("sshs_model_hash", "sshs_legacy_hash")


@dataclass(frozen=True)
class DyLora:
    """The options of a DyLoRA (arXiv:2210.07558), which can be truncated to the first b of its R components.

    Attributes:
        unit: The ranks b are multiples of it.
        rank_scaling: The scale at rank b: "constant" is alpha/R, "rank" is alpha/b, "sqrt" is alpha/R · √(R/b).
        freeze_lower: Whether each training step trained only the last `unit` of the b components.
        rank_sampling: How b was sampled in training: "uniform" is one b for all samples of a step; "spread" is one b
            for each sample, with low ranks and the full rank more often.
    """

    unit: int = 1
    rank_scaling: str = "sqrt"
    freeze_lower: bool = False
    rank_sampling: str = "spread"

    def __post_init__(self) -> None:
        if not isinstance(self.unit, int) or self.unit < 1 or self.rank_scaling not in RANK_SCALINGS:
            raise AdapterError(f"invalid DyLoRA options: unit {self.unit}, rank_scaling {self.rank_scaling}")
        if self.rank_sampling not in RANK_SAMPLINGS:
            raise AdapterError(f"unknown rank_sampling {self.rank_sampling!r}: expected {', '.join(RANK_SAMPLINGS)}")


DYLORA_FACTS = tuple(field.name for field in fields(DyLora))  # also used in network_args and as fields of DyLoraConfig


def network_args(metadata: Mapping[str, str]) -> dict[str, str]:
    """ss_network_args as a dictionary; {} if it is missing or not a JSON object."""
    try:
        table = json_value(metadata.get("ss_network_args", "{}"))
    except ValueError:
        return {}
    return {str(key): str(value) for key, value in table.items()} if isinstance(table, dict) else {}


def dylora_of(metadata: Mapping[str, str]) -> DyLora | None:
    """The DyLoRA options in the metadata of a kohya file.

    Args:
        metadata: The metadata. Files of kohya's trainer do not contain rank_scaling; it is "rank" for them, since
            kohya's splitter keeps alpha.

    Returns:
        The options; None if the file is not a DyLoRA.
    """
    if metadata.get("ss_network_module", "") not in ("networks.dylora", "network.dylora"):
        return None
    args = network_args(metadata)
    unit = args.get("unit", "1")
    return DyLora(
        unit=int(unit) if re.fullmatch(r"0*[1-9][0-9]{0,8}", unit) else 1,
        rank_scaling=_known_scaling(args.get("rank_scaling", "rank")),
        freeze_lower=args.get("freeze_lower", "False") == "True",
        rank_sampling=_known_sampling(args.get("rank_sampling", "uniform")),
    )


def _known_scaling(name: object) -> str:
    if name not in RANK_SCALINGS:
        raise AdapterError(f"unknown rank_scaling {name!r} in the metadata: expected {', '.join(RANK_SCALINGS)}")
    return str(name)


def _known_sampling(name: object) -> str:
    return str(name) if name in RANK_SAMPLINGS else "uniform"  # does not matter once the adapter is trained


def own_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """This package's entries in the `auto_mapping` of a PEFT config; {} if it has none."""
    mapping = config.get("auto_mapping")
    facts = mapping.get("lora_adapters") if isinstance(mapping, Mapping) else None
    return dict(facts) if isinstance(facts, Mapping) else {}


def dylora_of_config(config: Mapping[str, Any]) -> DyLora | None:
    """The DyLoRA options in `auto_mapping` of a PEFT config, where this package stores them.

    Args:
        config: The config as a dictionary.

    Returns:
        The options; None if the config is not that of a DyLoRA.

    Raises:
        AdapterError: A value is invalid.
    """
    facts = own_facts(config)
    if facts.get("type") != "DyLora":
        return None
    unit = facts.get("unit", 1)
    if not isinstance(unit, int) or unit < 1:
        raise AdapterError(f"invalid DyLoRA unit {unit!r} in the config: it must be an integer of at least 1")
    scaling = _known_scaling(facts.get("rank_scaling", "constant"))
    sampling = _known_sampling(facts.get("rank_sampling"))
    return DyLora(unit, scaling, facts.get("freeze_lower") is True, sampling)


def dylora_metadata(dylora: DyLora, args: Mapping[str, str]) -> dict[str, str]:
    """The metadata entries for DyLoRA options; other network args are kept."""
    facts = {name: str(value) for name, value in asdict(dylora).items()}
    return {"ss_network_module": "networks.dylora", "ss_network_args": json.dumps({**args, **facts})}


def complete(metadata: Mapping[str, str], families: Sequence[ModelFamily], rank: int, alpha: float) -> dict[str, str]:
    """Add the missing entries that readers of kohya's files expect.

    Args:
        metadata: The metadata; its entries are kept, except for hashes.
        families: The families that the adapter may be for; entries that differ between them are not added.
        rank: The rank of most modules.
        alpha: The alpha of most modules.

    Returns:
        All entries, without hashes.
    """
    first, *others = (_defaults(metadata, family, rank, alpha) for family in families)
    agreed = {key: text for key, text in first.items() if all(other.get(key) == text for other in others)}
    kept = {key: value for key, value in metadata.items() if key not in _HASHES}
    date = datetime.now(timezone.utc).replace(microsecond=0, tzinfo=None).isoformat()
    return {**agreed, "modelspec.date": date, **kept}


def _defaults(metadata: Mapping[str, str], family: ModelFamily, rank: int, alpha: float) -> dict[str, str]:
    base = metadata.get(BASE_VERSION, family.stated)
    version = version_named(base)
    defaults = {
        "ss_v2": str(is_v2(base)),
        BASE_VERSION: base,
        "ss_network_module": family.network_module,
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(alpha)),
        "ss_network_args": "{}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base if version is None else version.modelspec}/lora",
        "modelspec.implementation": family.implementation,
        "modelspec.title": metadata.get("ss_output_name", "LoRA"),
        "modelspec.resolution": (version or family.versions[0]).resolution,
    }
    if family.versions[0].prediction is not None:
        defaults["modelspec.prediction_type"] = "v" if base.endswith("_v") else "epsilon"
    return defaults


MERGED_FACTS = ("ss_tag_frequency", "modelspec.trigger_phrase", "modelspec.merged_from")
_WEIGHTS_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def merged_facts(sources: Sequence[Mapping[str, str]], names: Sequence[str] = ()) -> dict[str, str]:
    """The metadata that a combination of adapters keeps of its sources.

    Args:
        sources: The metadata of each adapter.
        names: The files, folders or repositories of the adapters; if empty, modelspec.merged_from of the sources is
            used.

    Returns:
        ss_tag_frequency with the summed counts of all tags, modelspec.trigger_phrase with all words, and
        modelspec.merged_from; empty entries are left out.
    """
    combined = {key: _listed([source.get(key, "") for source in sources]) for key in MERGED_FACTS[1:]}
    if names:
        combined["modelspec.merged_from"] = ", ".join(map(title_of, names))
    tags: dict[str, Counter[str]] = {}
    for source in sources:
        for folder, counts in json_table(source.get("ss_tag_frequency")).items():
            numbers = json_table(counts).items()
            tags.setdefault(folder, Counter()).update({tag: n for tag, n in numbers if isinstance(n, int | float)})
    if tags:
        combined["ss_tag_frequency"] = json.dumps(tags)
    return {key: text for key, text in combined.items() if text}


def sum_facts(sources: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The metadata of a sum: the base model of the first source that has one, and `merged_facts` of all."""
    told = next((source for source in sources if source.get(BASE_VERSION)), sources[0])
    base = {key: told[key] for key in ("ss_v2", BASE_VERSION) if key in told}
    return {**base, **merged_facts(sources)}


def title_of(source: str) -> str:
    """The name of a weights file without its extension, of a folder, or of a repository."""
    path = Path(source).expanduser()
    return path.stem if path.suffix.lower() in _WEIGHTS_ENDINGS else path.resolve().name


def _listed(texts: Iterable[str]) -> str:
    """Join comma-separated lists to one, without duplicates."""
    words = [word.strip() for text in texts for word in text.split(",")]
    return ", ".join(dict.fromkeys(word for word in words if word))
