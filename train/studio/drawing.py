"""Generates the images of the tab Compare like `lora-adapters generate`, with a model that stays loaded."""

import gc
import inspect
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_adapters.train.generation.draw import Drawer, completed
from lora_adapters.train.generation.image_grid import draw_sheet
from lora_adapters.train.generation.networks import LiveNetworks
from lora_adapters.train.generation.offload import check_offload, offload
from lora_adapters.train.generation.options import parse
from lora_adapters.train.generation.output import Album, save
from lora_adapters.train.generation.plan import Plan, plan
from lora_adapters.train.generation.requests import check_sizes
from lora_adapters.train.generation.run import best_device, load
from lora_adapters.train.models.base import BaseModels
from lora_adapters.train.studio.compare import Axis, Scene, cells, python_code
from lora_adapters.train.studio.paths import StudioError


class Artist:
    """Keeps the model loaded, with the adapters of the last image.

    model: the options of `lora-adapters generate` that select the model. folder: where images are saved.
    """

    def __init__(self, model: Sequence[str], folder: Path):
        self._words, self._folder = list(model), folder
        self._models: BaseModels | None = None
        self._pipe: Any = None
        self._live: tuple[Any, LiveNetworks] | None = None  # (key of the loaded adapters, their layers)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Stop a grid after the current image."""
        self._stopped.set()

    def release(self) -> None:
        """Free the model's memory."""
        self._models = self._pipe = self._live = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def draw(self, scene: Scene) -> Path:
        """Generate an image and save it with its settings. Returns its path."""
        image, album, made = self._drawn(scene)
        return album.add(made.requests[0], image)

    def draw_grid(
        self,
        scene: Scene,
        across: Axis | None,
        down: Axis | None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Path:
        """Generate a labelled grid and save it. Returns its path. StudioError if it was stopped."""
        self._stopped.clear()
        rows = cells(scene, across, down)
        places = [(row, column) for row in range(len(rows)) for column in range(len(rows[0]))]
        places.sort(key=lambda place: _loaded(rows[place[0]][place[1]]))  # minimises the loading of adapters
        drawn: dict[tuple[int, int], Image.Image] = {}
        for place in places:
            if self._stopped.is_set():
                raise StudioError(f"stopped after {len(drawn)} of {len(places)} images")
            progress(len(drawn), len(places))
            drawn[place], album, made = self._drawn(rows[place[0]][place[1]])
        labels = down.titles if down else [scene.prompt]
        images = [[drawn[row, column] for column in range(len(rows[0]))] for row in range(len(rows))]
        sheet = draw_sheet(list(zip(labels, images, strict=True)), across.titles if across else [""])
        path = album.sheet_path()
        over = "; ".join(f"{axis.name}: {', '.join(axis.values)}" for axis in (across, down) if axis)
        save(sheet, path, album.text(made.requests[0], over))
        return path

    def _drawn(self, scene: Scene) -> tuple[Image.Image, Album, Plan]:
        settings = parse([*scene.words(self._words), f"--outdir={self._folder}"])
        made = plan(settings)
        device = best_device()
        check_offload(settings, device)
        if self._models is None:
            self._models = load(settings, device)
            scheduler = self._sampler("ddim")
            self._pipe = self._models.pipeline(scheduler)
            if settings.offload:
                offload(self._pipe, settings.offload, device)
        models = self._models
        check_sizes(made.requests, models.family)
        request = completed(made.requests[0], models)
        made = Plan([request], made.networks, [])
        drawer = Drawer(
            models,
            settings,
            device,
            self._pipe,
            self._networks(scene, made),
            [network.multiplier for network in made.networks],
        )
        (_, image), *_ = drawer.draw([request])
        return image, Album(settings, models, made.networks), made

    def _sampler(self, name: str) -> Any:
        models = self._models
        assert models is not None
        return models.family.sampler(name, models.prediction_type, False, models.schedule_config)

    def _networks(self, scene: Scene, made: Plan) -> LiveNetworks:
        """Load the adapters into the pipeline. Those of the last image are kept if only weights or ranks differ."""
        key = [(network.source, _written(network.source), slot.blocks) for network, slot in
               zip(made.networks, scene.slots, strict=True)]  # fmt: skip
        if self._live is not None and self._live[0] == key:
            self._live[1].follow(made.networks)
            return self._live[1]
        if self._live is not None:
            self._live = None
            self._pipe.unload_lora_weights()
        try:
            live = LiveNetworks(self._pipe, made.networks)
        except BaseException:
            self._pipe.unload_lora_weights()  # unload adapters that were loaded before the error
            raise
        self._live = (key, live)
        return live

    def code(self, rows: Sequence[Sequence[Scene]]) -> str:
        """Python code that generates the images of `rows`."""
        if self._models is None:
            raise StudioError("draw the image first")
        models = self._models
        schedulers = {name: _as_code(self._sampler(name)) for name in {scene.sampler for row in rows for scene in row}}
        is_file, dtype = Path(models.name).is_file(), str(models.denoiser.dtype)
        imports = []
        offloaded = next((word.partition("=")[2] for word in self._words if word.startswith("--offload=")), None)
        words = [word for word in self._words if not word.startswith("--offload=")]
        if models.family.has_flow and (is_file or len(words) > 1):  # diffusers cannot load separate parts
            imports = [
                "from lora_adapters.train.generation.options import parse as options",
                "from lora_adapters.train.models.base import load_base_models",
            ]
            scheduler = next(iter(schedulers.values()))
            load = f"load_base_models(options({words!r}), {dtype}).pipeline({scheduler})"
        else:
            start = "from_single_file" if is_file else "from_pretrained"
            load = f"{type(self._pipe).__name__}.{start}({models.name!r}, dtype={dtype})"
        if offloaded:
            load += f"\npipe.enable_{offloaded}_cpu_offload()"
        elif best_device().type != "cpu":
            load += f'.to("{best_device().type}")'
        return python_code(rows, load, schedulers, imports)


def _as_code(scheduler: Any) -> str:
    """The constructor call of a scheduler, with the arguments that differ from the defaults."""
    usual = {name: value.default for name, value in inspect.signature(type(scheduler).__init__).parameters.items()}
    own = {key: value for key, value in scheduler.config.items() if key in usual and value != usual[key]}
    return f"{type(scheduler).__name__}({', '.join(f'{key}={value!r}' for key, value in own.items())})"


def _loaded(scene: Scene) -> list[str]:
    return [slot.argument for slot in scene.slots]


def _written(source: str) -> float:
    path = Path(source)
    return path.stat().st_mtime if path.exists() else 0.0
