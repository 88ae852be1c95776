"""The tab Compare: adapters with sliders, an image or a grid, its command and Python code, and merging into a file."""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr

from lora_adapters.convert.families.registry import FAMILIES
from lora_adapters.train.models.registry import FAMILIES as TRAINED
from lora_adapters.train.samplers import SAMPLERS
from lora_adapters.train.studio import compare
from lora_adapters.train.studio.compare import PRESETS, Axis, Choice, Scene, Slot
from lora_adapters.train.studio.drawing import Artist
from lora_adapters.train.studio.jobs import Jobs
from lora_adapters.train.studio.page import Lists, shown
from lora_adapters.train.studio.paths import Folders, StudioError

SLOTS = 4
_FIRST = max((compare.labels(name) for name, family in TRAINED.items() if not family.has_flow), key=len)
_MOST = max(len(compare.labels(family.name)) for family in FAMILIES)  # number of block sliders; unused ones are hidden
_MOST_SIDE = 2048


@dataclass
class CompareTab:
    """The tab's fields and events. model: the options of `generate` that select the model."""

    folders: Folders
    jobs: Jobs
    artist: Artist
    model: list[str]
    lists: Lists
    weights: list[Any] = field(default_factory=list)
    ranks: list[Any] = field(default_factory=list)
    blocks: list[Any] = field(default_factory=list)
    groups: list[Any] = field(default_factory=list)
    sliders: list[Any] = field(default_factory=list)

    def build(self) -> None:
        """Add the fields to the current tab, and connect their events."""
        with gr.Row():
            with gr.Column(scale=5, min_width=380):
                self._adapters()
                self._image_settings()
                self._block_sliders()
                self._grid()
            with gr.Column(scale=6, min_width=380, elem_classes="stays"):
                self._result()
        self._connect()

    # --- fields ------------------------------------------------------------------------------------------------------

    def _adapters(self) -> None:
        self.prompt = gr.Textbox(label="Prompt", lines=2, elem_id="prompt")
        self.negative = gr.Textbox(label="Negative prompt")
        self.chosen = self.lists.field(
            self.folders.adapter_files,
            value=[],
            multiselect=True,
            max_choices=SLOTS,
            allow_custom_value=True,
            label="Adapters",
            info=f"up to {SLOTS} from the folders, or type owner/name of a repository on the Hub",
            elem_id="adapters",
        )
        for number in range(SLOTS):
            with gr.Group(visible=False) as group:
                weight = gr.Slider(-2, 2, 1, step=0.05, label="weight", elem_id=f"weight-{number + 1}")
                rank = gr.Slider(1, 2, 1, step=1, label="rank", visible=False, elem_id=f"rank-{number + 1}")
                blocks = gr.Textbox(
                    label="blocks", placeholder="all; a preset (MIDD), names (IN02 OUT05) or numbers", max_lines=1,
                    elem_id=f"blocks-{number + 1}",
                )  # fmt: skip
            self.groups.append(group)
            self.weights.append(weight)
            self.ranks.append(rank)
            self.blocks.append(blocks)

    def _block_sliders(self) -> None:
        with gr.Accordion("Blocks as sliders", open=False, elem_id="blocks-panel"):
            with gr.Row():
                self.edited = gr.Dropdown([], label="of adapter", scale=2)
                self.preset = gr.Dropdown(list(PRESETS), value=None, label="preset", scale=1, elem_id="preset")
            with gr.Row(elem_classes="blocks-of"):
                third = -(-len(_FIRST) // 3)
                names = [*_FIRST, *(f"{number}" for number in range(len(_FIRST), _MOST))]
                for start in (0, third, 2 * third):
                    with gr.Column(min_width=120):
                        more = range(len(_FIRST) + start // third, _MOST, 3)
                        for place in (*range(start, min(start + third, len(_FIRST))), *more):
                            self._slider(place, names[place])
            self.sliders.sort(key=lambda slider: names.index(slider.elem_id.removeprefix("block-")))

    def _slider(self, place: int, name: str) -> None:
        visible = place < len(_FIRST)
        self.sliders.append(gr.Slider(-1, 2, 1, step=0.05, label=name, elem_id=f"block-{name}", visible=visible))

    def _image_settings(self) -> None:
        with gr.Row():
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, elem_id="seed")
            self.steps = gr.Slider(1, 150, 20, step=1, label="Steps", elem_id="steps")
            self.scale = gr.Slider(1, 20, 7, step=0.5, label="Guidance", elem_id="scale")
        with gr.Row():
            self.sampler = gr.Dropdown(list(SAMPLERS), value="ddim", label="Sampler")
            self.width = gr.Number(0, label="Width", precision=0, minimum=0, maximum=_MOST_SIDE, info="0: the model's")
            self.height = gr.Number(
                0, label="Height", precision=0, minimum=0, maximum=_MOST_SIDE, info="0: the model's"
            )

    def _grid(self) -> None:
        with gr.Accordion("Grid", open=False):
            self.axes: list[tuple[Any, Any]] = []
            for place in ("across", "down"):
                with gr.Row():
                    axis = gr.Dropdown(
                        [("-", ""), *compare.axes(SLOTS)], value="", label=place, elem_id=f"axis-{place}"
                    )
                    values = gr.Textbox(label="values", lines=1, max_lines=6, scale=2, elem_id=f"values-{place}")
                axis.change(_hinted, axis, values, show_progress="hidden")
                self.axes.append((axis, values))

    def _result(self) -> None:
        self.image = gr.Image(
            label="Image", type="filepath", interactive=False, height=460, elem_id="image", buttons=["download"]
        )
        with gr.Row():
            self.draw = gr.Button("Draw", variant="primary", elem_id="draw", scale=4)
            self.stop = gr.Button("Stop the grid", elem_id="stop-grid", scale=1, min_width=140)
        self.drawn = gr.State([])  # the scenes of the shown image, by row
        with gr.Tab("Command line"):
            self.command = gr.Code(
                language="shell", label="draws the same", wrap_lines=True, max_lines=12, elem_id="command"
            )
        with gr.Tab("Python"):
            self.python = gr.Code(
                language="python", label="draws the same through diffusers", wrap_lines=True, max_lines=12
            )
        with gr.Tab("Merge into a file"):
            gr.Markdown("Saves the adapters, with the weights, ranks and blocks of the shown image, as one file.")
            with gr.Row():
                self.into = gr.Radio(["one adapter", "the model"], value="one adapter", label="merge into")
                self.name = gr.Textbox(label="name of the result", elem_id="merge-name")
            self.one_file = gr.Checkbox(False, label="save a model that is a folder as one file")
            self.merge = gr.Button("Merge", elem_id="merge")

    # --- events ------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        fields = [self.prompt, self.negative, self.seed, self.steps, self.scale, self.sampler, self.width, self.height]
        fields += [self.chosen, *self.weights, *self.ranks, *self.blocks]
        hidden: dict[str, Any] = {"show_progress": "hidden"}
        shells = [*self.groups, *self.weights, *self.ranks, self.edited]
        self.chosen.change(shown(self._chosen), [self.chosen], shells, **hidden)
        to_sliders = [self.chosen, self.edited, *self.blocks]
        gr.on(
            [self.edited.change, *(text.blur for text in self.blocks), *(text.submit for text in self.blocks)],
            shown(self._to_sliders), to_sliders, self.sliders, **hidden,
        )  # fmt: skip
        self.preset.input(shown(self._preset), [self.preset, self.chosen, self.edited, *self.blocks],
                          [*self.sliders, *self.blocks], **hidden)  # fmt: skip
        gr.on([slider.release for slider in self.sliders], shown(self._from_sliders),
              [self.chosen, self.edited, *self.sliders, *self.blocks], self.blocks, **hidden)  # fmt: skip
        grid = [part for pair in self.axes for part in pair]
        self.draw.click(shown(self._draw), [*fields, *grid], [self.image, self.command, self.python, self.drawn],
                        show_progress_on=self.image, concurrency_id="gpu")  # fmt: skip
        self.stop.click(self.artist.stop, queue=False)
        self.merge.click(shown(self._merge), [self.drawn, self.name, self.into, self.one_file], None)

    def _choice(self, source: str) -> Choice:
        path = Path(source)
        return _read_choice(self.folders.adapter(source), path.stat().st_mtime if path.exists() else 0.0)

    def _chosen(self, chosen: list[str]) -> list[Any]:
        """Updates of each adapter's fields: hidden if there is no adapter, with a rank slider for a DyLoRA."""
        choices = [self._choice(source) for source in chosen]
        names = [Slot(source).name for source in chosen]
        spare = SLOTS - len(chosen)
        groups = [gr.Group(visible=True)] * len(chosen) + [gr.Group(visible=False)] * spare
        weights = [gr.Slider(label=f"weight of adapter {n + 1}, {name}") for n, name in enumerate(names)]
        ranks = [_rank_slider(choice) for choice in choices]
        edited = [(f"{n + 1}, {name}", n) for n, name in enumerate(names)]
        dropdown = gr.Dropdown(choices=edited, value=0 if edited else None)
        return [*groups, *weights, *[gr.Slider()] * spare, *ranks, *[gr.Slider(visible=False)] * spare, dropdown]

    def _architecture(self, chosen: list[str], edited: int | None) -> str:
        if edited is None or edited >= len(chosen):
            raise StudioError("choose the adapter whose blocks are to be changed")
        return self._choice(chosen[edited]).architecture

    def _to_sliders(self, chosen: list[str], edited: int | None, *blocks: str) -> list[Any]:
        """Set the sliders to the block weights in the edited adapter's text field."""
        if edited is None or edited >= len(chosen):
            return [gr.Slider()] * _MOST
        return self._sliders(self._architecture(chosen, edited), blocks[edited])

    def _sliders(self, architecture: str, text: str) -> list[Any]:
        labels, values = compare.labels(architecture), compare.block_values(text, architecture)
        updates = [gr.Slider(value, label=label, visible=True) for label, value in zip(labels, values, strict=True)]
        return updates + [gr.Slider(visible=False)] * (_MOST - len(labels))

    def _preset(self, preset: str | None, chosen: list[str], edited: int | None, *blocks: str) -> list[Any]:
        if preset is None:
            return [gr.Slider()] * _MOST + list(blocks)
        architecture = self._architecture(chosen, edited)
        texts = [("" if preset == "ALL" else preset) if n == edited else text for n, text in enumerate(blocks)]
        return [*self._sliders(architecture, preset), *texts]

    def _from_sliders(self, chosen: list[str], edited: int | None, *values: Any) -> list[str]:
        count = len(compare.labels(self._architecture(chosen, edited)))
        numbers, texts = values[:_MOST], values[_MOST:]
        return [compare.block_text(numbers[:count]) if n == edited else text for n, text in enumerate(texts)]

    def _scene(self, *values: Any) -> Scene:
        prompt, negative, seed, steps, scale, sampler, width, height, chosen, *numbers = values
        weights, ranks, blocks = (numbers[n * SLOTS : (n + 1) * SLOTS] for n in range(3))
        slots = []
        for number, source in enumerate(chosen):
            full = self._choice(source).ranks
            text = "" if blocks[number].strip() == "ALL" else blocks[number].strip()
            slots.append(Slot(self.folders.adapter(source), weights[number], ranks[number] if full else None, text))
        if not prompt.strip():
            raise StudioError("the prompt is empty")
        for what, number in (("seed", seed), ("width", width), ("height", height)):
            if number is None:
                raise StudioError(f"the {what} is empty")
        line, unwanted = (" ".join(text.split()) for text in (prompt, negative))
        return Scene(line, unwanted, seed, steps, scale, sampler, width or None, height or None, tuple(slots))

    def _draw(self, progress: Any = gr.Progress(), *values: Any) -> list[Any]:  # noqa: B008 (gradio asks for it)
        *fields, across_name, across_text, down_name, down_text = values
        scene = self._scene(*fields)
        across = Axis.of(across_name, across_text) if across_name else None
        down = Axis.of(down_name, down_text) if down_name else None
        rows = compare.cells(scene, across, down)
        with self.jobs.reserved("drawing"):
            if across or down:
                path = self.artist.draw_grid(scene, across, down, lambda *counts: progress(counts, "drawing"))
            else:
                path = self.artist.draw(scene)
            return [str(path), compare.command_lines(rows, self.model), self.artist.code(rows), rows]

    def _merge(self, rows: list[list[Scene]], name: str, into: str, one_file: bool) -> None:
        if not rows:
            raise StudioError("draw an image first: the adapters of the shown image are merged")
        if len(rows) > 1 or len(rows[0]) > 1:
            raise StudioError("a grid has several settings: draw the single image whose adapters are to be merged")
        words = compare.merge_words(rows[0][0], self.folders, name, into == "the model", one_file)
        self.jobs.start(f"merging {name}", words, self.folders.private / "tools.log")


def _hinted(axis: str) -> Any:
    return gr.Textbox(placeholder=compare.hint(axis), lines=3 if axis == "prompt" else 1)


def _rank_slider(choice: Choice) -> Any:
    if not choice.ranks:
        return gr.Slider(visible=False)
    first, last = choice.ranks[0], choice.ranks[-1]
    step = choice.ranks[1] - first if len(choice.ranks) > 2 else max(1, last - first)
    return gr.Slider(minimum=first, maximum=last, value=last, step=step, visible=True, label="rank of this DyLoRA")


@lru_cache(maxsize=64)
def _read_choice(source: str, written: float) -> Choice:
    """Read an adapter's `Choice`. written: modification time, so that a replaced file is read again."""
    return compare.choice_of(source)
