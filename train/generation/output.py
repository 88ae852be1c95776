"""Writes image files: chooses their names, and stores the generation settings in them."""

import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lora_adapters import __version__
from lora_adapters.convert.storage.files import replacing
from lora_adapters.train.generation.networks import Network, unmerged
from lora_adapters.train.generation.options import GenerateSettings
from lora_adapters.train.generation.png_info import parameters, save_options, short_hash
from lora_adapters.train.generation.requests import ImageRequest
from lora_adapters.train.models.base import BaseModels
from lora_adapters.train.options.values import required
from lora_adapters.train.samplers import SAMPLERS


class Album:
    """Names the images of a run and writes each with its settings."""

    def __init__(self, settings: GenerateSettings, models: BaseModels, networks: Sequence[Network]):
        self.settings, self._models, self._networks = settings, models, networks
        self.folder = Path(settings.outdir)
        self._time = time.strftime("%Y%m%d%H%M%S")
        self._count = 0
        file = Path(required(settings.pretrained_model_name_or_path, "--ckpt"))
        self._model = {"Model": file.stem if file.is_file() else file.name}
        if file.is_file():
            self._model = {"Model hash": short_hash(file), **self._model}

    def add(self, request: ImageRequest, image: Image.Image) -> Path:
        """Write an image and return its path."""
        path = self._path(request)
        self._count += 1
        save(image, path, self.text(request))
        return path

    def _path(self, request: ImageRequest) -> Path:
        if request.file is not None:
            path = self.folder / request.file
            return path if path.suffix else path.with_suffix(".png")
        if self.settings.use_original_file_name and request.start is not None:
            return self._free(request.start.stem)
        if self.settings.sequential_file_name:
            return self.folder / f"im_{self._count + 1:06d}.png"
        return self._free(f"im_{self._time}_{self._count:03d}_{request.seed}")

    def _free(self, stem: str) -> Path:
        """A path in the folder that does not exist yet."""
        names = (f"{stem}{f'-{n}' if n > 1 else ''}.png" for n in range(1, 1_000_000))
        return next(path for path in map(self.folder.joinpath, names) if not path.exists())

    def sheet_path(self) -> Path:
        """The path of the sheet."""
        return Path(self.settings.sheet) if self.settings.sheet else self._free(f"sweep_{self._time}")

    def text(self, request: ImageRequest, sweep: str = "") -> str:
        """The settings of an image as text."""
        live = unmerged(self._networks)
        own = request.multipliers or [network.multiplier for network in live]
        weights = [(network.name, network.multiplier) for network in self._networks if network.merged]
        weights += [(network.name, weight) for network, weight in zip(live, own, strict=True)]
        entries: dict[str, object] = {
            "Steps": request.steps,
            "Sampler": "Euler" if self._models.family.has_flow else SAMPLERS[request.sampler].title,
            "CFG scale": f"{request.scale:g}",
            "Seed": request.seed,
            "Size": f"{request.width}x{request.height}",
            **self._model,
        }
        if request.strength is not None:
            entries["Denoising strength"] = f"{request.strength:g}"
        if self.settings.vae:
            entries["VAE"] = Path(self.settings.vae).name
        if self.settings.clip_skip:
            entries["Clip skip"] = self.settings.clip_skip
        hashes = {network.name: network.adapter.metadata["sshs_model_hash"][:12] for network in self._networks
                  if "sshs_model_hash" in network.adapter.metadata}  # fmt: skip
        if hashes:
            entries["Lora hashes"] = ", ".join(f"{name}: {digest}" for name, digest in hashes.items())
        ranks = {network.name: network.rank if network.merged or request.rank is None else request.rank
                 for network in self._networks if network.adapter.dylora}  # fmt: skip
        if any(ranks.values()):
            entries["Lora ranks"] = ", ".join(f"{name}: {rank}" for name, rank in ranks.items() if rank)
        sizes = {"Original size": (request.original_width, request.original_height),
                 "Negative original size": (request.negative_original_width, request.negative_original_height),
                 "Crop": (request.crop_left, request.crop_top)}  # fmt: skip
        for key, pair in sizes.items():
            if pair != (None, None):
                entries[key] = "x".join("-" if side is None else str(side) for side in pair)
        if sweep:
            entries["Sweep"] = sweep
        entries["Version"] = f"lora-adapters {__version__}"
        return parameters(request.prompt, request.negative_prompt, weights, entries)


def save(image: Image.Image, path: Path, text: str) -> None:
    """Write an image with its settings, atomically."""
    with replacing(path) as partial:
        image.save(partial, **save_options(text, path.suffix.lower()))
