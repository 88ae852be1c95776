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
    """The options of a DyLoRA (arXiv:2210.07558).

    The ranks are multiples of `unit`. `rank_scaling` is the scale of the first b of R components: "constant" is
    alpha/R, "rank" is alpha/b, "sqrt" is alpha/R · √(R/b). With `freeze_lower`, only the last `unit` of the b
    components were trained in a step. `rank_sampling` is how b was sampled: "uniform", one b for all samples of a step,
    or "spread", one b for each sample, with low ranks and the full rank more often.
    """

    unit: int = 1
    rank_scaling: str = "sqrt"
    freeze_lower: bool = False
    rank_sampling: str = "spread"

    def __post_init__(self) -> None:
        if not isinstance(self.unit, int) or self.unit < 1 or self.rank_scaling not in RANK_SCALINGS:
            raise AdapterError(f"a DyLoRA of unit {self.unit} and rank_scaling {self.rank_scaling} is not known")
        if self.rank_sampling not in RANK_SAMPLINGS:
            raise AdapterError(f"rank_sampling {self.rank_sampling!r}: {', '.join(RANK_SAMPLINGS)} are known")


DYLORA_FACTS = tuple(field.name for field in fields(DyLora))  # also names of network_args and of DyLoraConfig's fields


def network_args(metadata: Mapping[str, str]) -> dict[str, str]:
    """ss_network_args as a table; {} where it is missing or no JSON object."""
    try:
        table = json_value(metadata.get("ss_network_args", "{}"))
    except ValueError:
        return {}
    return {str(key): str(value) for key, value in table.items()} if isinstance(table, dict) else {}


def dylora_of(metadata: Mapping[str, str]) -> DyLora | None:
    """The DyLoRA options in the metadata of a kohya file.

    Args:
        metadata: The metadata. Files of kohya's own trainer have no rank_scaling; it is "rank", since kohya's splitter
            keeps alpha.

    Returns:
        The options; None for a file of another type.
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
        raise AdapterError(f"its metadata says rank_scaling {name!r}: {', '.join(RANK_SCALINGS)} are known")
    return str(name)


def _known_sampling(name: object) -> str:
    return str(name) if name in RANK_SAMPLINGS else "uniform"  # how it was trained changes nothing in how it is used


def own_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What this package wrote into a PEFT config's `auto_mapping`; {} where it wrote nothing."""
    mapping = config.get("auto_mapping")
    facts = mapping.get("lora_adapters") if isinstance(mapping, Mapping) else None
    return dict(facts) if isinstance(facts, Mapping) else {}


def dylora_of_config(config: Mapping[str, Any]) -> DyLora | None:
    """The DyLoRA options in `auto_mapping` of a PEFT config, where this package's configs have them.

    Args:
        config: The config as a dictionary.

    Returns:
        The options; None for a config of another type.

    Raises:
        AdapterError: A value is impossible.
    """
    facts = own_facts(config)
    if facts.get("type") != "DyLora":
        return None
    unit = facts.get("unit", 1)
    if not isinstance(unit, int) or unit < 1:
        raise AdapterError(f"its config says that DyLoRA's unit is {unit!r}: it is a number from 1 on")
    scaling = _known_scaling(facts.get("rank_scaling", "constant"))
    sampling = _known_sampling(facts.get("rank_sampling"))
    return DyLora(unit, scaling, facts.get("freeze_lower") is True, sampling)


def dylora_metadata(dylora: DyLora, args: Mapping[str, str]) -> dict[str, str]:
    """The entries that say so, with the other network args kept."""
    facts = {name: str(value) for name, value in asdict(dylora).items()}
    return {"ss_network_module": "networks.dylora", "ss_network_args": json.dumps({**args, **facts})}


def complete(metadata: Mapping[str, str], families: Sequence[ModelFamily], rank: int, alpha: float) -> dict[str, str]:
    """Add the entries that readers of kohya's files expect and that are missing.

    Args:
        metadata: The metadata; its entries are kept, except for hashes.
        families: The families that the adapter may be for; what differs between them is not added.
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
    """What a combination of adapters keeps of their metadata.

    Args:
        sources: the metadata of each.
        names: the files, folders or repositories that it is made from; without them, what the sources say they are.

    Returns:
        ss_tag_frequency with the tags of all counted together, modelspec.trigger_phrase with the words of all, and
        modelspec.merged_from; each only where there is something to say.
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
    """The metadata of a sum: the base model that the first one tells, and `merged_facts` of all."""
    told = next((source for source in sources if source.get(BASE_VERSION)), sources[0])
    base = {key: told[key] for key in ("ss_v2", BASE_VERSION) if key in told}
    return {**base, **merged_facts(sources)}


def title_of(source: str) -> str:
    """The name of a weights file without its ending, of a folder, or of a repository."""
    path = Path(source).expanduser()
    return path.stem if path.suffix.lower() in _WEIGHTS_ENDINGS else path.resolve().name


def _listed(texts: Iterable[str]) -> str:
    """All that comma-separated lists name, each once."""
    words = [word.strip() for text in texts for word in text.split(",")]
    return ", ".join(dict.fromkeys(word for word in words if word))
