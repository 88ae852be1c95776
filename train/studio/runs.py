"""Trainings: the settings of the page as `lora-adapters train`, and what a run's folder says of how it goes."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lora_adapters.convert.storage.atomic import replacing
from lora_adapters.train.studio import presets
from lora_adapters.train.studio.images import caption_ending
from lora_adapters.train.studio.paths import Folders, StudioError

TYPES = {"LoRA": "lierla", "LoRA-C3Lier": "c3lier", "DyLoRA": "dylora", "LoHa": "loha", "LoKr": "lokr"}
PRECISIONS = ("no", "fp16", "bf16")
LOG, SETTINGS, DATASET, PROMPTS = "log.txt", "run.json", "dataset.toml", "prompts.txt"
_FORMER_NAMES = {"pictures": "images"}  # of settings, in the files of older runs
_STEP = re.compile(r"training:[^|\r\n]*\|[^|\r\n]*\|\s*(\d+)/\d+ \[[^\]\r\n]*\bloss=([\d.]+)")
_HELD_OUT = re.compile(r"step (\d+): held-out loss (.+)")
_VALUE = re.compile(r"(\w+) ([\d.]+)")


@dataclass(frozen=True)
class Recipe:
    """The settings of a training.

    images: their folder. resolution: in pixels. save_every, sample_every: steps, 0 for never. machine, purpose:
    names of presets, whose options without a field here are given to the trainer, too; empty for none.
    """

    name: str
    images: str
    type: str = "LoRA"
    rank: int = 16
    alpha: float = 16
    conv_rank: int = 0
    unit: int = 4
    class_tokens: str = ""
    resolution: int = 512
    batch: int = 1
    repeats: int = 1
    steps: int = 1000
    learning_rate: float = 1e-4
    held_out: float = 0.0
    precision: str = "no"
    checkpointing: bool = False
    cache_latents: bool = True
    save_every: int = 0
    sample_every: int = 0
    prompts: str = ""
    seed: int = 0
    machine: str = ""
    purpose: str = ""

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise StudioError(f"{self.type!r:.40} is not a type of adapter: {', '.join(TYPES)} are")
        if self.precision not in PRECISIONS:
            raise StudioError(f"{self.precision!r:.40} is not a precision: {', '.join(PRECISIONS)} are")
        if not self.name.strip():
            raise StudioError("give the adapter a name")

    @property
    def network(self) -> list[str]:
        """The options of the adapter."""
        words = [f"--network_module={TYPES[self.type]}", f"--network_dim={self.rank}"]
        words += [f"--network_alpha={self.alpha:g}"]
        args = [f"unit={self.unit}"] if self.type == "DyLoRA" else []
        if self.type != "LoRA" and self.conv_rank:
            args += [f"conv_dim={self.conv_rank}", f"conv_alpha={self.alpha:g}"]
        return [*words, "--network_args", *args] if args else words

    def words(self, model: str, run: Path) -> list[str]:
        """The words of `lora-adapters train`; run is its folder, with dataset.toml and prompts.txt in it."""
        words = [
            "train",
            f"--pretrained_model_name_or_path={model}",
            f"--dataset_config={run / DATASET}",
            f"--output_dir={run}",
            f"--output_name={self.name}",
            *self.network,
            f"--max_train_steps={self.steps}",
            f"--learning_rate={self.learning_rate:g}",
            f"--mixed_precision={self.precision}",
            f"--seed={self.seed}",
            "--save_state_on_train_end",
            "--console_log_simple",
        ]
        words += ["--gradient_checkpointing"] if self.checkpointing else []
        words += ["--cache_latents"] if self.cache_latents else []
        words += [f"--save_every_n_steps={self.save_every}"] if self.save_every else []
        words += presets.words(self.machine, self.purpose)
        if self.sample_every and self.prompts.strip():
            words += [f"--sample_prompts={run / PROMPTS}", f"--sample_every_n_steps={self.sample_every}"]
        return words

    def dataset(self) -> str:
        """dataset.toml."""
        folder = Path(self.images)
        low = min(256, self.resolution)
        return "\n".join(
            [
                "[general]",
                f"resolution = {self.resolution}",
                "enable_bucket = true",
                f"min_bucket_reso = {low}",
                f"max_bucket_reso = {max(1024, 2 * self.resolution)}",
                f"bucket_reso_steps = {min(64, max(8, self.resolution // 8 // 8 * 8))}",
                f"caption_extension = {json.dumps(caption_ending(folder))}",
                *([f"validation_split = {self.held_out:g}"] if self.held_out else []),
                "",
                "[[datasets]]",
                f"batch_size = {self.batch}",
                "",
                "  [[datasets.subsets]]",
                f"  image_dir = {json.dumps(str(folder))}",
                f"  num_repeats = {self.repeats}",
                *([f"  class_tokens = {json.dumps(self.class_tokens)}"] if self.class_tokens.strip() else []),
                "",
            ]
        )


def write(recipe: Recipe, run: Path) -> None:
    """Write what the training reads, and the settings, into the run's folder."""
    run.mkdir(parents=True, exist_ok=True)
    texts = {DATASET: recipe.dataset(), PROMPTS: recipe.prompts.strip() + "\n", SETTINGS: json.dumps(asdict(recipe))}
    for name, text in texts.items():
        with replacing(run / name) as partial:
            partial.write_text(text, encoding="utf-8")


def prepared(recipe: Recipe, folders: Folders) -> tuple[list[str], Path]:
    """The words and the folder of a new run, written. StudioError if the name is taken."""
    folders.image_folder(recipe.images)
    run = folders.new(recipe.name)
    write(recipe, run)
    return recipe.words(folders.model, run), run


def dry(recipe: Recipe, folders: Folders) -> tuple[list[str], Path]:
    """The same for a dry run, which makes no run's folder."""
    folders.image_folder(recipe.images)
    run = folders.private / "dry-run"
    write(recipe, run)
    return [*recipe.words(folders.model, run), "--dry_run"], run


def resumed(name: str, steps: int, folders: Folders) -> tuple[list[str], Path]:
    """The words that go on with a run up to so many steps. StudioError if it has no saved state."""
    run = run_folder(name, folders)
    recipe = replace(load(run), steps=steps)
    state = newest_state(run)
    if state is None:
        raise StudioError(f"{name} has no saved state to resume from")
    if state[0] >= steps:
        raise StudioError(f"{name} has made {state[0]} steps: give more than {state[0]} to resume")
    write(recipe, run)
    return [*recipe.words(folders.model, run), f"--resume={state[1]}"], run


def load(run: Path) -> Recipe:
    """The settings of a run. StudioError if its folder has none."""
    try:
        entries = json.loads((run / SETTINGS).read_text(encoding="utf-8"))
        entries = {_FORMER_NAMES.get(key, key): value for key, value in entries.items()}
        known = {field.name for field in fields(Recipe)}
        return Recipe(**{key: value for key, value in entries.items() if key in known})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise StudioError(f"{run} has no settings of a run ({error})") from None


# --- what runs say ---------------------------------------------------------------------------------------------------


def runs(folders: Folders) -> list[str]:
    """The names of all runs, the newest first."""
    folders_of_runs = [path.parent for path in folders.output.glob(f"*/{SETTINGS}")]
    return [path.name for path in sorted(folders_of_runs, key=lambda path: -(path / SETTINGS).stat().st_mtime)]


def run_folder(name: str, folders: Folders) -> Path:
    """The folder of a run. StudioError if there is none of that name."""
    if name not in runs(folders):
        raise StudioError(f"there is no run {name!r:.80}")
    return folders.output / name


def newest_state(run: Path) -> tuple[int, Path] | None:
    """(steps made, folder) of the state that goes furthest; None without any."""
    states: list[tuple[int, Path]] = []
    for file in run.glob("*-state/train_state.json"):
        try:
            states.append((int(json.loads(file.read_text(encoding="utf-8"))["current_step"]), file.parent))
        except (OSError, ValueError, KeyError, TypeError):  # one that is being written, or is damaged
            continue
    return max(states, default=None)


def log_of(run: Path) -> str:
    """All that the run has printed."""
    try:
        return (run / LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def losses(log: str, most: int = 400) -> list[tuple[int, float, str]]:
    """The losses in the log of a run, for a plot.

    Args:
        log: The output of the training so far.
        most: The largest number of training losses; if there are more, every n-th is taken.

    Returns:
        (step, loss, name): the mean training loss that the progress bar shows, and held-out losses. If a step was
        repeated after a stop, its last loss counts.
    """
    training = {int(step): float(loss) for step, loss in _STEP.findall(log)}
    steps = sorted(training)
    kept = steps[:: -(-len(steps) // most)] if steps else []
    kept += steps[-1:] if steps and kept[-1] != steps[-1] else []
    points = [(step, training[step], "training") for step in kept]
    for step, text in _HELD_OUT.findall(log.replace("\r", "\n")):
        for part in text.split(", "):
            value = _VALUE.fullmatch(part.strip())
            if value:
                points.append((int(step), float(value[2]), _held_out_name(value[1])))
    return points


def _held_out_name(name: str) -> str:
    rank = re.search(r"rank(\d+)$", name)
    return f"held out, rank {rank[1]}" if rank else "held out"


def samples(run: Path) -> list[Path]:
    """The sample images of a run, the newest first."""
    return sorted((run / "sample").glob("*.png"), key=lambda path: -path.stat().st_mtime)


def report(run: Path) -> Path | None:
    """The page that a run has written beside its adapter, the newest; None before it has."""
    pages = (path for path in run.glob("*-report.html") if not path.is_symlink())
    return max(pages, key=lambda path: path.stat().st_mtime, default=None)


def recipe_of(values: dict[str, Any], names: Sequence[str]) -> Recipe:
    """A recipe from what a page's fields hold: numbers that a page leaves empty are an error in one line."""
    kinds = {field.name: field.type for field in fields(Recipe)}
    read: dict[str, Any] = {}
    for name in names:
        value = values[name]
        if value is None:
            raise StudioError(f"{name.replace('_', ' ')} is empty")
        whole = kinds[name] in (int, "int")
        if whole and value != int(value):
            raise StudioError(f"{name.replace('_', ' ')} is a whole number, not {value:g}")
        read[name] = int(value) if whole else value
    return Recipe(**read)
