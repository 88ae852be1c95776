"""The tab Train: images and captions, settings, and the progress of a run."""

from pathlib import Path
from typing import Any

import gradio as gr
import pandas

from lora_adapters.train.studio import presets, runs
from lora_adapters.train.studio.images import captioned_images, save_caption, thumbnail
from lora_adapters.train.studio.jobs import Jobs
from lora_adapters.train.studio.page import Lists, framed, shown
from lora_adapters.train.studio.paths import Folders, StudioError
from lora_adapters.train.studio.runs import Recipe

_NAMES = (
    "name", "images", "type", "rank", "alpha", "conv_rank", "unit", "class_tokens", "resolution", "batch", "repeats",
    "steps", "learning_rate", "held_out", "precision", "checkpointing", "cache_latents", "save_every", "sample_every",
    "prompts", "seed", "machine", "purpose",
)  # fmt: skip


class TrainTab:
    """The tab's fields and their events."""

    def __init__(self, folders: Folders, jobs: Jobs, lists: Lists):
        self._folders, self._jobs, self._lists = folders, jobs, lists
        self.fields: dict[str, Any] = {}

    def build(self) -> None:
        """Add the fields to the current tab, and connect their events."""
        with gr.Row():
            with gr.Column(scale=5, min_width=380):
                self._images()
            with gr.Column(scale=6, min_width=380):
                self._settings()
        self._run()
        self._connect()

    # --- fields ------------------------------------------------------------------------------------------------------

    def _images(self) -> None:
        self.fields["images"] = self._lists.field(
            self._folders.image_folders, label="Folder of images", elem_id="images"
        )
        self.gallery = gr.Gallery(
            label="Images: choose one to edit its caption", columns=5, height=330, object_fit="contain",
            allow_preview=False, interactive=False, elem_id="gallery",
        )  # fmt: skip
        self.listed = gr.State([])  # the names of the gallery's images
        self.image = gr.State(None)
        self.caption = gr.Textbox(label="Caption", lines=3, elem_id="caption")
        self.save = gr.Button("Save caption", elem_id="save-caption")

    def _settings(self) -> None:
        new = self.fields
        machines, purposes = presets.choices()
        with gr.Row():
            for name, listed, label in (("machine", machines, "the machine"), ("purpose", purposes, "what is learned")):
                new[name] = gr.Dropdown([("-", ""), *listed], value="", label=f"Preset for {label}", elem_id=name)
        with gr.Accordion("Options of the presets, with reasons", open=False):
            self.reasons = gr.Dataframe(headers=["option", "value", "why", "source"], datatype="str", wrap=True,
                                        interactive=False, show_label=False, elem_id="reasons")  # fmt: skip
        with gr.Row():
            new["name"] = gr.Textbox(label="Name of the adapter", elem_id="run-name")
            new["type"] = gr.Dropdown(list(runs.TYPES), value="LoRA", label="Type", elem_id="type")
            new["class_tokens"] = gr.Textbox(label="Caption for images without one")
        with gr.Row():
            new["rank"] = gr.Number(16, label="Rank", precision=0, minimum=1, elem_id="rank")
            new["alpha"] = gr.Number(16, label="Alpha", minimum=0)
            new["conv_rank"] = gr.Number(0, label="Rank of 3x3", precision=0, minimum=0,
                                         info="not of LoRA", elem_id="conv-rank")  # fmt: skip
            new["unit"] = gr.Number(4, label="Unit", precision=0, minimum=1, info="DyLoRA")
        with gr.Row():
            new["steps"] = gr.Number(1000, label="Steps", precision=0, minimum=1, elem_id="train-steps")
            new["learning_rate"] = gr.Number(1e-4, label="Learning rate", minimum=0, step=1e-5, elem_id="rate")
            new["batch"] = gr.Number(1, label="Batch", precision=0, minimum=1)
            new["repeats"] = gr.Number(1, label="Repeats", precision=0, minimum=1)
        with gr.Row():
            new["resolution"] = gr.Number(512, label="Resolution", precision=0, minimum=64, info="pixels",
                                          elem_id="resolution")  # fmt: skip
            new["held_out"] = gr.Slider(0, 0.5, 0, step=0.05, label="Held out", info="share of the images")
            new["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0)
        with gr.Row():
            new["precision"] = gr.Dropdown(list(runs.PRECISIONS), value="no", label="Mixed precision")
            new["checkpointing"] = gr.Checkbox(False, label="Gradient checkpointing", info="far less memory, slower")
            new["cache_latents"] = gr.Checkbox(True, label="Cache latents", info="faster")
        with gr.Row():
            new["save_every"] = gr.Number(0, label="Save every", precision=0, minimum=0, info="steps; 0: at the end")
            new["sample_every"] = gr.Number(0, label="Samples every", precision=0, minimum=0, info="steps; 0: never",
                                            elem_id="sample-every")  # fmt: skip
            new["prompts"] = gr.Textbox(label="Prompts of samples", lines=2, scale=3, elem_id="sample-prompts",
                                        info="one per line, optionally with --w --h --s --l --d --n")  # fmt: skip
        with gr.Row():
            self.dry = gr.Button("Dry run", elem_id="dry-run")
            self.start = gr.Button("Start", variant="primary", elem_id="start")
            self.stop = gr.Button("Stop", elem_id="stop")

    def _run(self) -> None:
        with gr.Row():
            self.shown_run = gr.Dropdown([], label="Run", elem_id="run", scale=3)
            with gr.Column(scale=1, min_width=200):
                self.resume = gr.Button("Resume, to the steps above", elem_id="resume", size="md")
                self.take = gr.Button("Load its settings", size="md")
        with gr.Row():
            self.losses = gr.LinePlot(
                None, x="step", y="loss", color="which", title="Loss (training: mean over the last epoch)",
                height=300, elem_id="losses",
            )  # fmt: skip
            self.samples = gr.Gallery(label="Samples, newest first", columns=2, height=300, interactive=False,
                                      object_fit="contain", elem_id="samples")  # fmt: skip
        with gr.Accordion("Report of the run: charts, samples, data, settings, next steps", open=False):
            self.report = gr.HTML("There is no report yet: it is written at each save.", elem_id="report")

    # --- events ------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        hidden: dict[str, Any] = {"show_progress": "hidden"}
        folder, fields = self.fields["images"], [self.fields[name] for name in _NAMES]
        show = shown(self._show)
        folder.change(show, folder, [self.gallery, self.listed, self.image, self.caption])
        self.gallery.select(shown(self._select), [folder, self.listed], [self.image, self.caption], **hidden)
        self.save.click(shown(self._save), [folder, self.image, self.caption], self.gallery, **hidden)
        for choice in (self.fields["machine"], self.fields["purpose"]):
            choice.input(shown(self._preset), [self.fields["machine"], self.fields["purpose"]],
                         [self.reasons, *fields], **hidden)  # fmt: skip
        self.dry.click(shown(self._dry), fields, None)
        self.start.click(shown(self._start), fields, self.shown_run)
        self.stop.click(shown(lambda: gr.Info(self._jobs.stop()) and None), None, None, queue=False)
        self.resume.click(shown(self._resume), [self.shown_run, self.fields["steps"]], None)
        self.take.click(shown(self._take), self.shown_run, fields)

    def names(self) -> Any:
        """The dropdown of runs, with the newest selected."""
        names = runs.runs(self._folders)
        return gr.Dropdown(choices=names, value=names[0] if names else None)

    def restore(self, page: Any) -> None:
        """Show the newest run and its settings when the page is opened."""
        page.load(self.names, None, self.shown_run, show_progress="hidden").then(
            lambda name: self._take(name) if name else [gr.skip()] * len(_NAMES),
            self.shown_run,
            [self.fields[name] for name in _NAMES],
            show_progress="hidden",
        )

    def follow(self, timer: Any) -> None:
        """Update the shown run whenever the timer ticks."""
        last = gr.State(None)
        timer.tick(self._now, [self.shown_run, last], [self.losses, self.samples, self.report, last],
                   show_progress="hidden", concurrency_limit=None)  # fmt: skip

    def _now(self, name: str | None, before: Any) -> list[Any]:
        if name not in runs.runs(self._folders):
            return [gr.skip()] * 4
        run = self._folders.output / name
        log, samples, report = runs.log_of(run), runs.samples(run), runs.report(run)
        now = [name, len(log), [path.name for path in samples], report and report.stat().st_mtime]
        if now == before:
            return [gr.skip()] * 4
        frame = pandas.DataFrame(runs.losses(log), columns=["step", "loss", "which"])
        images_changed = before is None or before[0] != name or before[2] != now[2]
        gallery = [(str(path), path.stem) for path in samples] if images_changed else gr.skip()
        shown_report = framed(report) if before is None or [before[0], before[3]] != [name, now[3]] else gr.skip()
        return [frame, gallery, shown_report, now]

    def _show(self, folder: str | None) -> list[Any]:
        if not folder:
            return [[], [], None, ""]
        images = captioned_images(self._folders.image_folder(folder))
        return [self._thumbnails(folder), [image.path.name for image in images], None, ""]

    def _thumbnails(self, folder: str) -> list[Any]:
        cache = self._folders.private / "thumbnails"
        listed = []
        for image in captioned_images(self._folders.image_folder(folder)):
            small = thumbnail(image.path, cache)
            text = "no caption" if image.caption is None else image.caption
            listed.append((str(small), text) if small else (_broken(cache), f"{image.path.name} cannot be read"))
        return listed

    def _select(self, folder: str, listed: list[str], event: gr.SelectData) -> list[Any]:
        name = listed[event.index]
        captions = {image.path.name: image.caption for image in captioned_images(self._folders.image_folder(folder))}
        return [name, gr.Textbox(value=captions.get(name) or "", label=f"Caption of {name}")]

    def _save(self, folder: str, name: str | None, caption: str) -> list[Any]:
        if not folder or not name:
            raise StudioError("choose an image first")
        save_caption(self._folders.image_folder(folder), name, caption)
        return self._thumbnails(folder)

    def _recipe(self, values: tuple[Any, ...]) -> Recipe:
        entries = dict(zip(_NAMES, values, strict=True))
        if not entries["images"]:
            raise StudioError("choose a folder of images (the list has the folders inside of --images)")
        return runs.recipe_of(entries, _NAMES)

    def _preset(self, machine: str, purpose: str) -> list[Any]:
        """The table of the presets' options, and the values of the fields that they set."""
        rows = [list(row) for row in presets.reasons(machine, purpose)] or [[""] * 4]
        filled = presets.values(machine, purpose)
        return [rows, *(filled.get(name, gr.skip()) for name in _NAMES)]

    def _dry(self, *values: Any) -> None:
        recipe = self._recipe(values)
        words, run = runs.dry(recipe, self._folders)
        self._jobs.start(f"dry run of {recipe.name}", words, run / runs.LOG)

    def _start(self, *values: Any) -> Any:
        recipe = self._recipe(values)
        with self._jobs.reserved(f"training {recipe.name}"):  # no folder is created for a run that cannot start
            words, run = runs.prepared(recipe, self._folders)
        self._jobs.start(f"training {recipe.name}", words, run / runs.LOG)
        return self.names()

    def _resume(self, name: str | None, steps: float | None) -> None:
        if not name or steps is None:
            raise StudioError("choose a run and its new total number of steps")
        with self._jobs.reserved(f"training {name}"):
            words, run = runs.resumed(name, int(steps), self._folders)
        self._jobs.start(f"training {name}", words, run / runs.LOG)

    def _take(self, name: str | None) -> list[Any]:
        if not name:
            raise StudioError("choose a run")
        recipe = runs.load(runs.run_folder(name, self._folders))
        return [getattr(recipe, field) for field in _NAMES]


def _broken(cache: Path) -> str:
    """A grey image, shown instead of an image that cannot be read."""
    from PIL import Image

    file = cache / "unreadable.jpg"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), "grey").save(file)
    return str(file)
