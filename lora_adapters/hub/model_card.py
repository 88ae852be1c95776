"""The model card of an adapter: what the Hub shows of it, and what its page says."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.deltas.low_rank import rank_range
from lora_adapters.convert.families import detection
from lora_adapters.convert.families.registry import BASE_VERSION, version_named
from lora_adapters.convert.formats.metadata import DYLORA_FACTS, network_args

# A card with this line was written here and is written anew with each push; without it, it is somebody's own.
MARK = "<!-- Written by lora-adapters. Take this line out, and later pushes leave this card as it is. -->"

_FACTS = {
    "ss_sd_model_name": "Base model",
    "ss_num_train_images": "Training pictures",
    "ss_num_reg_images": "Regularization pictures",
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
    """A picture that the card shows: its path in the repository, and the prompt that it was drawn with."""

    path: str
    prompt: str = "-"


def kind(adapter: Adapter) -> str:
    """LierLa, C3Lier or DyLoRA."""
    if adapter.dylora is not None:
        return "DyLoRA"
    residual = (".resnets.", ".downsamplers.", ".upsamplers.")
    return "C3Lier" if any(part in module.path for module in adapter.modules for part in residual) else "LierLa"


def family(adapter: Adapter) -> tuple[str, str]:
    """Name of the family of models that it is for, and the Hub's repository of the one it stems from.

    The metadata says it; SD2.x is also told by the width of its text, 1024 where SD1.x has 768.
    """
    found = detection.base_model_of(adapter.modules, adapter.metadata)
    told = version_named(adapter.metadata.get(BASE_VERSION, ""))
    version = told or found.version or found.family.versions[0]
    return version.long_title, version.repository


def base_model_of(adapter: Adapter) -> str:
    """The repository of its base model: the one it was trained on where the metadata names it, else its family's."""
    from lora_adapters.convert.storage.sources import is_repo_id

    name = adapter.metadata.get("ss_sd_model_name", "")
    return name if is_repo_id(name) else family(adapter)[1]


def _ranks(adapter: Adapter) -> str:
    """ "4", or the range of ranks with how many modules have them, the most common first."""
    ranks = Counter(one.rank for one in adapter.modules.values()).most_common()
    if len(ranks) == 1:
        return str(ranks[0][0])
    counts = [f"{rank} in {count}{' modules' if at == 0 else ''}" for at, (rank, count) in enumerate(ranks)]
    return f"{rank_range(rank for rank, _ in ranks)} ({', '.join(counts)})"


def _alphas(adapter: Adapter) -> str:
    return ", ".join(f"{alpha:g}" for alpha, _ in Counter(one.alpha for one in adapter.modules.values()).most_common())


def _dial(adapter: Adapter) -> list[int]:
    """The ranks that a DyLoRA can be used at."""
    highest, unit = max(one.rank for one in adapter.modules.values()), adapter.dylora.unit if adapter.dylora else 1
    return [*range(unit, highest, unit), highest]


def _cell(text: str) -> str:
    """Text from a file's metadata, fit for a cell of a Markdown table."""
    flat = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _facts(adapter: Adapter) -> list[tuple[str, str]]:
    told = adapter.metadata
    rows = [("Type", kind(adapter)), ("Rank", _ranks(adapter)), ("Alpha", _alphas(adapter))]
    if adapter.dylora is not None:
        ranks = [str(rank) for rank in _dial(adapter)]
        shown = ranks if len(ranks) <= 12 else [*ranks[:6], "...", ranks[-1]]
        rows.append(("Can be used at rank", ", ".join(shown)))
    rows += [("Made for", family(adapter)[0]), ("Adapts", ", ".join(adapter.components))]
    rows += [(label, told[key]) for key, label in _FACTS.items() if told.get(key, "None") not in ("None", "", "0")]
    own = DYLORA_FACTS if adapter.dylora else ()
    args = {key: value for key, value in network_args(told).items() if key not in own}
    if args:
        rows.append(("Network arguments", ", ".join(f"{key}={value}" for key, value in args.items())))
    return rows


def _usage(adapter: Adapter, repo_id: str, subfolder: str | None, base_model: str, prompt: str) -> str:
    where = f'"{repo_id}", subfolder="{subfolder}"' if subfolder else f'"{repo_id}"'
    lines = [
        "from diffusers import AutoPipelineForText2Image",
        "",
        f'pipe = AutoPipelineForText2Image.from_pretrained("{base_model}")',
        f"pipe.load_lora_weights({where})",
        f"image = pipe({prompt!r}).images[0]",
    ]
    text = "## Use\n\n```python\n" + "\n".join(lines) + "\n```\n"
    if adapter.dylora is not None:
        ranks = _dial(adapter)
        text += (
            "\nThis is a DyLoRA: one file that works at every rank in the table. Other programs use it at its highest "
            "rank; with `lora_adapters` imported before it is loaded, the rank can be changed at any time:\n\n"
            f"```python\nimport lora_adapters\n\nlora_adapters.set_rank(pipe, {ranks[len(ranks) // 2]})\n```\n"
        )
    return text


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
    """A `huggingface_hub.ModelCard` with the metadata of the Hub's LoRA pages (widget, base model, trigger words).

    base_model: a repository; by default the one that the adapter's metadata names, else the first of its family.
    samples: pictures of single prompts, for the Hub's gallery; grid: the path of one picture of many.
    subfolder: where in the repository the adapter is, if not at its top.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base_model = base_model or base_model_of(adapter)
    trigger = ", ".join(trigger_words)
    pictures = [*samples, *([Sample(grid)] if grid and not samples else [])]
    widget = [{"text": one.prompt, "output": {"url": one.path}} for one in pictures]
    own = ["text-to-image", adapter.family.tag, "lora", "diffusers", "template:sd-lora", kind(adapter).lower()]
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=base_model,
        base_model_relation="adapter",
        tags=list(dict.fromkeys([*own, *tags])),
        instance_prompt=trigger or None,
        widget=widget or ([{"text": trigger}] if trigger else None),
    )
    title = adapter.metadata.get("ss_output_name") or repo_id.split("/")[-1]
    parts = [f"# {_cell(title)}", ""]
    parts += [description.strip(), ""] if description else []
    if samples:
        parts += ["<Gallery />", ""]
    if grid:
        parts += [f"![Samples]({grid})", ""]
    if trigger:
        words = ", ".join(f"`{word}`" for word in trigger_words)
        parts += ["## Trigger words", "", f"Write {words} in the prompt to call it up.", ""]
    prompt = trigger or next((one.prompt for one in samples if one.prompt != "-"), "a photo")
    parts += [_usage(adapter, repo_id, subfolder, base_model, prompt)]
    rows = [f"| {label} | {_cell(value)} |" for label, value in _facts(adapter)]
    parts += ["## What it is", "", "| | |", "|---|---|", *rows, ""]
    parts += [
        "`pytorch_lora_weights.safetensors` is for diffusers, AUTOMATIC1111, ComfyUI and kohya's scripts; the folders "
        "of the components are for PEFT.",
        "",
        MARK,
        "",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(parts))
