"""Training runs: command lines of `lora-adapters train` from the page's settings, and progress from a run's folder."""

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
_FORMER_NAMES = {"pictures": "images"}  # renamed settings in files of older runs
_STEP = re.compile(r"training:[^|\r\n]*\|[^|\r\n]*\|\s*(\d+)/\d+ \[[^\]\r\n]*\bloss=([\d.]+)")
_HELD_OUT = re.compile(r"step (\d+): held-out loss (.+)")
_VALUE = re.compile(r"(\w+) ([\d.]+)")


@dataclass(frozen=True)
class Recipe:
    """The settings of a training.

    images: the folder of images. resolution: in pixels. save_every, sample_every: in steps; 0 means never. machine,
    purpose: names of presets, whose options without a field here are also passed to the trainer; empty for none.
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
            raise StudioError(f"{self.type!r:.40} is not an adapter type; choose one of {', '.join(TYPES)}")
        if self.precision not in PRECISIONS:
            raise StudioError(f"{self.precision!r:.40} is not a precision; choose one of {', '.join(PRECISIONS)}")
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
        """The arguments of `lora-adapters train`. run: the run's folder with dataset.toml and prompts.txt."""
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
        """The text of dataset.toml."""
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
    """Write the input files of the training and the settings into the run's folder."""
    run.mkdir(parents=True, exist_ok=True)
    texts = {DATASET: recipe.dataset(), PROMPTS: recipe.prompts.strip() + "\n", SETTINGS: json.dumps(asdict(recipe))}
    for name, text in texts.items():
        with replacing(run / name) as partial:
            partial.write_text(text, encoding="utf-8")


def prepared(recipe: Recipe, folders: Folders) -> tuple[list[str], Path]:
    """Write a new run's folder. Returns its arguments and folder. StudioError if the name is taken."""
    folders.image_folder(recipe.images)
    run = folders.new(recipe.name)
    write(recipe, run)
    return recipe.words(folders.model, run), run


def dry(recipe: Recipe, folders: Folders) -> tuple[list[str], Path]:
    """Like `prepared`, for a dry run, which uses a private folder."""
    folders.image_folder(recipe.images)
    run = folders.private / "dry-run"
    write(recipe, run)
    return [*recipe.words(folders.model, run), "--dry_run"], run


def resumed(name: str, steps: int, folders: Folders) -> tuple[list[str], Path]:
    """The arguments and folder to resume a run up to `steps`. StudioError if it has no saved state."""
    run = run_folder(name, folders)
    recipe = replace(load(run), steps=steps)
    state = newest_state(run)
    if state is None:
        raise StudioError(f"{name} has no saved state to resume from")
    if state[0] >= steps:
        raise StudioError(f"{name} has already trained {state[0]} steps: give more than {state[0]} to resume")
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
        raise StudioError(f"{run} has no readable settings of a run ({error})") from None


# --- existing runs ---------------------------------------------------------------------------------------------------


def runs(folders: Folders) -> list[str]:
    """The names of all runs, newest first."""
    folders_of_runs = [path.parent for path in folders.output.glob(f"*/{SETTINGS}")]
    return [path.name for path in sorted(folders_of_runs, key=lambda path: -(path / SETTINGS).stat().st_mtime)]


def run_folder(name: str, folders: Folders) -> Path:
    """The folder of a run. StudioError if there is no run with this name."""
    if name not in runs(folders):
        raise StudioError(f"there is no run {name!r:.80}")
    return folders.output / name


def newest_state(run: Path) -> tuple[int, Path] | None:
    """(steps, folder) of the saved state with the most steps; None without a state."""
    states: list[tuple[int, Path]] = []
    for file in run.glob("*-state/train_state.json"):
        try:
            states.append((int(json.loads(file.read_text(encoding="utf-8"))["current_step"]), file.parent))
        except (OSError, ValueError, KeyError, TypeError):  # a state that is being written or is damaged
            continue
    return max(states, default=None)


def log_of(run: Path) -> str:
    """The output of a run."""
    try:
        return (run / LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def losses(log: str, most: int = 400) -> list[tuple[int, float, str]]:
    """The losses in the log of a run, for a plot.

    Args:
        log: The output of the training so far.
        most: The maximum number of training losses; if there are more, every n-th is used.

    Returns:
        (step, loss, name): the mean training losses from the progress bar, and held-out losses. If a step was repeated
        after a stop, its last loss is used.
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
    """The sample images of a run, newest first."""
    return sorted((run / "sample").glob("*.png"), key=lambda path: -path.stat().st_mtime)


def report(run: Path) -> Path | None:
    """The newest HTML report of a run; None if there is none yet."""
    pages = (path for path in run.glob("*-report.html") if not path.is_symlink())
    return max(pages, key=lambda path: path.stat().st_mtime, default=None)


def recipe_of(values: dict[str, Any], names: Sequence[str]) -> Recipe:
    """Build a recipe from the values of the page's fields. StudioError for empty or fractional numbers."""
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
