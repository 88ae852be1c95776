"""The model card of an adapter: the metadata and the text of its page on the Hub."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.deltas.base import alpha_in
from lora_adapters.convert.deltas.low_rank import rank_range
from lora_adapters.convert.families import detection
from lora_adapters.convert.families.registry import BASE_VERSION, version_named
from lora_adapters.convert.formats.metadata import DYLORA_FACTS, network_args

# A card with this line was written by this package and is replaced by each push; other cards belong to the user.
MARK = "<!-- Written by lora-adapters. Take this line out, and later pushes leave this card as it is. -->"
_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")

_METADATA = {  # the metadata entries in the card, and their labels
    "ss_sd_model_name": "Trained on",
    "ss_num_train_images": "Training images",
    "ss_num_reg_images": "Regularization images",
    "ss_resolution": "Resolution",
    "ss_steps": "Steps",
    "ss_epoch": "Epochs",
    "ss_batch_size_per_device": "Batch size",
    "ss_total_batch_size": "Total batch size",
    "ss_gradient_accumulation_steps": "Gradient accumulation",
    "ss_optimizer": "Optimizer",
    "ss_lr_scheduler": "Schedule",
    "ss_learning_rate": "Learning rate",
    "ss_unet_lr": "Learning rate, U-Net",
    "ss_text_encoder_lr": "Learning rate, text encoder",
    "ss_network_dropout": "Dropout",
    "ss_min_snr_gamma": "min-SNR gamma",
    "ss_noise_offset": "Noise offset",
    "ss_clip_skip": "CLIP skip",
    "ss_mixed_precision": "Mixed precision",
    "ss_seed": "Seed",
    "ss_training_comment": "Comment",
}


@dataclass(frozen=True)
class Sample:
    """An image in the card: its path in the repository, and its prompt."""

    path: str
    prompt: str = "-"


def kind(adapter: Adapter) -> str:
    """The adapter's type: LierLa, C3Lier or DyLoRA, or the kinds of its changes if they are not low-rank pairs."""
    if adapter.dylora is not None:
        return "DyLoRA"
    if not adapter.has_only_pairs:
        return ", ".join(adapter.kinds)
    return adapter.family.adapter_type(adapter.modules).title


def family(adapter: Adapter) -> tuple[str, str]:
    """The base model of an adapter, for its model card.

    Args:
        adapter: The adapter. If the metadata do not contain the version, the width of the text encoder's output decides
            between SD1.x (768) and SD2.x (1024).

    Returns:
        The title of the version, and the Hub repository of its original model.
    """
    base = detection.base_model_of(adapter.modules, adapter.metadata)
    declared = version_named(adapter.metadata.get(BASE_VERSION, ""))
    version = declared or base.version or base.family.versions[0]
    return version.long_title, version.repository


def base_model_of(adapter: Adapter) -> str:
    """The repository of the base model: the one named in the metadata, or else the family's."""
    from lora_adapters.convert.storage.sources import is_repo_id

    name = adapter.metadata.get("ss_sd_model_name", "")
    return name if is_repo_id(name) else family(adapter)[1]


def _ranks(adapter: Adapter) -> str:
    """The ranks as text: "4", or several ranks with the number of modules of each, the most common first."""
    known = (change.rank for change in adapter.modules.values() if change.rank is not None)
    ranks = Counter(known).most_common()
    if not ranks:
        return "none"
    if len(ranks) == 1:
        return str(ranks[0][0])
    counts = [f"{rank} in {count}{' modules' if at == 0 else ''}" for at, (rank, count) in enumerate(ranks)]
    return f"{rank_range(rank for rank, _ in ranks)} ({', '.join(counts)})"


def _alphas(adapter: Adapter) -> str:
    alphas = Counter(alpha for change in adapter.modules.values() if (alpha := alpha_in(change)) is not None)
    return ", ".join(f"{alpha:g}" for alpha, _ in alphas.most_common()) or "none"


def _usable_ranks(adapter: Adapter) -> list[int]:
    """The ranks at which a DyLoRA can be used."""
    highest, unit = max(pair.rank for pair in adapter.pairs().values()), adapter.dylora.unit if adapter.dylora else 1
    return [*range(unit, highest, unit), highest]


def _cell(text: str) -> str:
    """Escape text from a file's metadata for a cell of a Markdown table."""
    flat = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _details(adapter: Adapter) -> list[tuple[str, str]]:
    """The rows of the card's table."""
    metadata = adapter.metadata
    rows = [("Type", kind(adapter)), ("Rank", _ranks(adapter)), ("Alpha", _alphas(adapter))]
    if adapter.dylora is not None:
        ranks = [str(rank) for rank in _usable_ranks(adapter)]
        shown = ranks if len(ranks) <= 12 else [*ranks[:6], "...", ranks[-1]]
        rows.append(("Can be used at rank", ", ".join(shown)))
    rows += [("Base model", family(adapter)[0]), ("Modules", ", ".join(adapter.components))]
    shown_entries = ((label, metadata.get(key, "None")) for key, label in _METADATA.items())
    rows += [(label, value) for label, value in shown_entries if value not in ("None", "", "0")]
    own = DYLORA_FACTS if adapter.dylora else ()
    args = {key: value for key, value in network_args(metadata).items() if key not in own}
    if args:
        rows.append(("Network arguments", ", ".join(f"{key}={value}" for key, value in args.items())))
    return rows


def _hub_metadata(
    adapter: Adapter,
    base_model: str,
    trigger: str,
    images: Sequence[Sample],
    license: str | None,
    tags: Sequence[str],
) -> Any:
    """The card's YAML block, a `huggingface_hub.ModelCardData`."""
    from huggingface_hub import ModelCardData

    kinds = kind(adapter).lower().split(", ")
    own = ["text-to-image", adapter.family.tag, "lora", "diffusers", "template:sd-lora", *kinds]
    widget = [{"text": image.prompt, "output": {"url": image.path}} for image in images]
    return ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=base_model,
        base_model_relation="adapter",
        tags=list(dict.fromkeys([*own, *tags])),
        instance_prompt=trigger or None,
        widget=widget or ([{"text": trigger}] if trigger else None),
    )


def model_card(
    adapter: Adapter,
    repo_id: str,
    *,
    base_model: str | None = None,
    trigger_words: Sequence[str] = (),
    description: str | None = None,
    license: str | None = None,
    samples: Sequence[Sample] = (),
    grid: str | None = None,
    tags: Sequence[str] = (),
    subfolder: str | None = None,
) -> Any:
    """The model card, with the metadata of the Hub's LoRA pages (widget, base model, trigger words).

    Args:
        adapter: The adapter.
        repo_id: Its repository, owner/name.
        base_model: The base model's repository; None uses the one named in the metadata, or else the family's original.
        trigger_words: Words that the prompt needs.
        description: Text below the title, in Markdown.
        license: The license's identifier on the Hub.
        samples: Images with their prompts, for the Hub's gallery.
        grid: The path of an image that contains several samples.
        tags: Further tags.
        subfolder: The adapter's folder in the repository; None for the root.

    Returns:
        A `huggingface_hub.ModelCard`.
    """
    from huggingface_hub import ModelCard

    base_model = base_model or base_model_of(adapter)
    trigger = ", ".join(trigger_words)
    images = [*samples, *([Sample(grid)] if grid and not samples else [])]
    prompt = trigger or next((sample.prompt for sample in samples if sample.prompt != "-"), "a photo")
    ranks = _usable_ranks(adapter) if adapter.dylora is not None else []
    return ModelCard.from_template(
        _hub_metadata(adapter, base_model, trigger, images, license, tags),
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        title=_cell(adapter.metadata.get("ss_output_name") or repo_id.split("/")[-1]),
        description=(description or "").strip(),
        gallery=bool(samples),
        grid=grid,
        trigger_words=", ".join(f"`{word}`" for word in trigger_words),
        base_model=base_model,
        location=f'"{repo_id}", subfolder="{subfolder}"' if subfolder else f'"{repo_id}"',
        prompt=repr(prompt),
        only_pairs=adapter.has_only_pairs,
        middle_rank=ranks[len(ranks) // 2] if ranks else None,
        details=[(label, _cell(value)) for label, value in _details(adapter)],
        mark=MARK,
    )
