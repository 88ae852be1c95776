"""Draws what Compare shows, with one model that stays loaded, as `lora-adapters generate` draws it."""

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
    """The model with the adapters of the last image on it.

    model: options of `lora-adapters generate` about the model. folder: where images are saved.
    """

    def __init__(self, model: Sequence[str], folder: Path):
        self._words, self._folder = list(model), folder
        self._models: BaseModels | None = None
        self._pipe: Any = None
        self._live: tuple[Any, LiveNetworks] | None = None  # (what is loaded, its layers)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End a grid after the image that is being drawn."""
        self._stopped.set()

    def release(self) -> None:
        """Give the model's memory back."""
        self._models = self._pipe = self._live = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def draw(self, scene: Scene) -> Path:
        """Draw an image and save it in the folder, with its settings in the file; returns its path."""
        image, album, made = self._drawn(scene)
        return album.add(made.requests[0], image)

    def draw_grid(
        self,
        scene: Scene,
        across: Axis | None,
        down: Axis | None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Path:
        """Draw a labelled grid into the folder; its path. StudioError if it was stopped."""
        self._stopped.clear()
        rows = cells(scene, across, down)
        places = [(row, column) for row in range(len(rows)) for column in range(len(rows[0]))]
        places.sort(key=lambda place: _loaded(rows[place[0]][place[1]]))  # adapters are loaded as seldom as can be
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
        """Put the adapters on the pipeline; those of the last image stay if only numbers differ."""
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
            self._pipe.unload_lora_weights()  # those before the one that does not fit
            raise
        self._live = (key, live)
        return live

    def code(self, rows: Sequence[Sequence[Scene]]) -> str:
        """Python code that draws the last images."""
        if self._models is None:
            raise StudioError("draw the image first")
        models = self._models
        schedulers = {name: _as_code(self._sampler(name)) for name in {scene.sampler for row in rows for scene in row}}
        is_file, dtype = Path(models.name).is_file(), str(models.denoiser.dtype)
        imports = []
        offloaded = next((word.partition("=")[2] for word in self._words if word.startswith("--offload=")), None)
        words = [word for word in self._words if not word.startswith("--offload=")]
        if models.family.has_flow and (is_file or len(words) > 1):  # diffusers puts no parts together
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
    """The call that makes such a scheduler."""
    usual = {name: value.default for name, value in inspect.signature(type(scheduler).__init__).parameters.items()}
    own = {key: value for key, value in scheduler.config.items() if key in usual and value != usual[key]}
    return f"{type(scheduler).__name__}({', '.join(f'{key}={value!r}' for key, value in own.items())})"


def _loaded(scene: Scene) -> list[str]:
    return [slot.argument for slot in scene.slots]


def _written(source: str) -> float:
    path = Path(source)
    return path.stat().st_mtime if path.exists() else 0.0
