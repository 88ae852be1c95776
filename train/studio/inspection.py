"""The content of the tab Inspect: facts, modules, ranks and norms of blocks, tags, trigger words of an adapter."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.deltas.base import alpha_in
from lora_adapters.convert.formats.metadata import title_of
from lora_adapters.convert.parsing import json_table
from lora_adapters.convert.programs.info import facts, read
from lora_adapters.convert.storage.sources import locate

Row = tuple[Any, ...]
TRIGGERS = "modelspec.trigger_phrase"
TAGS = "ss_tag_frequency"
_HASHES = {"right": "matches the metadata", "wrong": "does not match the metadata", "none": "none in the metadata"}


@dataclass(frozen=True)
class Report:
    """An adapter and the facts of `lora-adapters info`."""

    source: str
    adapter: Adapter
    facts: Mapping[str, Any]

    @property
    def name(self) -> str:
        return title_of(self.source)


def look(source: str) -> Report:
    """Read an adapter from a file, folder or repository. AdapterError if it cannot be read."""
    path = locate(source)
    adapter, unknown = read(path)
    return Report(source, adapter, facts(adapter, path, unknown))


def summary(report: Report) -> list[Row]:
    """(fact, value) rows that summarise the adapter."""
    about = report.facts
    rows = [
        ("type", about["type"]),
        ("for", f"{about['for']} ({about['base'] or 'the metadata name no base model'})"),
        ("rank", about["rank"]),
        ("modules", ", ".join(f"{count} in {component}" for component, count in about["modules"].items())),
        ("parameters", f"{about['parameters']:,} in {', '.join(about['dtypes'])}"),
        ("trigger words", trigger_words(report.adapter.metadata)),
        ("hash", _HASHES[about["hash"]]),
    ]
    if about["zero_alphas"]:
        rows.append(("alpha 0", f"in {about['zero_alphas']} modules, read as the rank"))
    if about["unknown_modules"]:
        rows.append(("modules of no known model", ", ".join(about["unknown_modules"])))
    return rows + list(about["training"].items())


def metadata(report: Report) -> list[Row]:
    """(key, value) of all metadata entries."""
    return sorted(report.adapter.metadata.items())


def block_rows(report: Report) -> list[Row]:
    """(block, modules, ranks, alphas, norm) of each block. The norm is empty if it depends on the model's weights."""
    return [
        (row["block"], row["modules"], _counts(row["ranks"]), _counts(row["alphas"]), _norm(row["norm"]))
        for row in report.facts["blocks"]
    ]


def module_rows(report: Report) -> list[Row]:
    """(module, kind, rank, alpha, shape) of each module."""
    rows = []
    for module, change in report.adapter.modules.items():
        alpha = alpha_in(change)
        shapes = ", ".join(f"{name} {'x'.join(map(str, part.shape))}" for name, part in change.tensors().items())
        rows.append((str(module), change.kind, change.rank, None if alpha is None else float(alpha), shapes))
    return rows


def bars(report: Report, what: str) -> list[Row]:
    """(block, value) for a plot: the "norm" of each block's weight change, or its largest "rank"."""
    rows: list[Row] = []
    for block in report.facts["blocks"]:
        value = block["norm"] if what == "norm" else max(map(float, block["ranks"]), default=None)
        if value is not None:
            rows.append((block["block"], value))
    return rows


def tags(adapter_metadata: Mapping[str, str], most: int = 200) -> list[Row]:
    """(tag, count) of the training captions, most frequent first; [] if the metadata has no tags."""
    counts: Counter[str] = Counter()
    for table in json_table(adapter_metadata.get(TAGS)).values():
        for tag, count in json_table(table).items():
            if isinstance(count, int | float):
                counts[tag.strip()] += int(count)
    return [(tag, count) for tag, count in counts.most_common(most) if tag]


def trigger_words(adapter_metadata: Mapping[str, str]) -> str:
    """The trigger words in the metadata, or else the most frequent tags."""
    named = adapter_metadata.get(TRIGGERS, "").strip()
    if named:
        return named
    frequent = [f"{tag} ({count})" for tag, count in tags(adapter_metadata, 5)]
    return f"none named; most frequent tags: {', '.join(frequent)}" if frequent else "none named"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(counts) if len(counts) < 2 else ", ".join(f"{value} ({n})" for value, n in counts.items())


def _norm(norm: float | None) -> float | None:
    return None if norm is None else float(f"{norm:.4g}")
