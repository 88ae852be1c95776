"""Renders the report's page from a run and its record. The template escapes all text, including captions."""

import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from lora_adapters.convert.tools.summary import shown_size
from lora_adapters.train.data.summary import tag_frequency
from lora_adapters.train.options.option import options_of
from lora_adapters.train.options.settings import Settings
from lora_adapters.train.training.report import charts
from lora_adapters.train.training.report.record import Record, last_by_rank, recommended_rank, thinned
from lora_adapters.train.training.saving import final_file, latest_state
from lora_adapters.train.training.setup import Run

_SAMPLES, _TAGS = 12, 20


def page(run: Run, record: Record, step: int) -> str:
    """The HTML of the report after `step` steps."""
    settings, file = run.settings, final_file(run)
    losses = last_by_rank(record)
    made = Environment(loader=PackageLoader("lora_adapters.train.training.report", ""), autoescape=True)
    lowest = min(((at, loss) for at, _, loss in record.held_out), key=lambda measured: measured[1], default=None)
    return made.get_template("page.html.jinja").render(
        title=settings.output_name or "last",
        state=f"{'finished' if step >= run.steps else 'training'}: step {step} of {run.steps}",
        facts=_facts(run, file),
        loss_chart=charts.loss_chart(record),
        held_out_chart=charts.held_out_chart(record),
        lowest=lowest,
        rank_chart=charts.rank_chart(record),
        recommended=recommended_rank(losses),
        samples=thinned(record.samples, _SAMPLES),
        prompts=[prompt.prompt for prompt in run.prompts],
        data=run.data.summary(),
        tags=_tags(run),
        settings=_settings(settings),
        commands=commands(run, file, recommended_rank(losses)),
        record=record.as_json(),
    )


def commands(run: Run, file: Path, rank: int | None) -> list[tuple[str, str]]:
    """Commands that use the adapter: (purpose, command line quoted for a shell)."""
    model, name = str(run.settings.pretrained_model_name_or_path), str(file)
    prompt = run.prompts[0].prompt if run.prompts else next(iter(run.data.trigger_words), "a photo")
    base = ["lora-adapters", "generate", "--ckpt", model, "--network_weights", name, "--prompt", prompt]
    lines = [
        ("Show what the file contains:", ["lora-adapters", "info", name]),
        ("Generate images at several weights:", [*base, "--sweep", "weight=0,0.5,0.8,1"]),
    ]
    if rank is not None:
        split = f"{file.with_name(f'{file.stem}-of-rank{file.suffix}')}"
        lines += [
            ("Generate images at several ranks:", [*base, "--sweep", f"rank={','.join(map(str, _ranks(run)))}"]),
            (f"Cut it to rank {rank}, for programs that do not know DyLoRA:",
             ["lora-adapters", "split", "--model", name, "--ranks", str(rank), "--save_to", split]),
        ]  # fmt: skip
    merged = str(file.with_name(f"{file.stem}-merged"))
    lines.append(("Merge it into the model:",
                  ["lora-adapters", "merge", "--sd_model", model, "--models", name, "--save_to", merged]))  # fmt: skip
    state = latest_state(run)
    if state is not None:
        resuming = ["lora-adapters", "train", *_as_words(run.settings), f"--resume={state}"]
        lines.append(("Resume from the last state (increase max_train_steps if the run is finished):", resuming))
    return [(purpose, shlex.join(words)) for purpose, words in lines]


def _ranks(run: Run) -> list[int]:
    return thinned(max((dial.ranks for dial in run.dials), key=len), 4)


def _facts(run: Run, file: Path) -> list[tuple[str, str]]:
    parameters = f"{sum(p.numel() for p in run.parameters):,} parameters in {len(run.layers)} modules"
    size = f" ({shown_size(file.stat().st_size)})" if file.is_file() else ""
    facts = [
        ("file", f"{file}{size}"),
        ("base model", f"{run.models.name}, {run.models.family.kinds[run.models.kind]}"),
        ("adapter", f"{run.settings.network_module}, {parameters}"),
    ]
    if run.data.trigger_words:
        facts.append(("trigger words", ", ".join(run.data.trigger_words)))
    return facts


def _tags(run: Run) -> list[str]:
    images, counts = run.data.images, Counter[str]()
    for number in range(len(images.datasets)):
        for tags in tag_frequency(images, number).values():
            counts.update(tags)
    return [f"{tag} ({count})" for tag, count in counts.most_common(_TAGS)]


def _given(settings: Settings) -> list[tuple[str, Any]]:
    """Name and value of the options that were given, except API keys and tokens."""
    known = options_of(Settings)
    return [(name, value) for name, value in settings.given_options().items() if not known[name].secret]


def _as_words(settings: Settings) -> list[str]:
    """The options as command-line arguments, including those of --config_file, which may have been edited since."""
    words, known = [], options_of(Settings)
    for name, value in _given(settings):
        if value in (None, "", False) or name in ("config_file", "resume"):
            continue
        if isinstance(value, dict):
            value = [f"{key}={text}" for key, text in value.items()]
        words += [known[name].flag, *map(str, value)] if isinstance(value, list) else (
            [known[name].flag] if known[name].is_flag else [f"{known[name].flag}={value}"]
        )  # fmt: skip
    return words


def _settings(settings: Settings) -> list[tuple[str, str]]:
    shown = [(name, value) for name, value in _given(settings) if value not in (None, "")]
    return [(name, " ".join(map(str, value)) if isinstance(value, list) else str(value)) for name, value in shown]
