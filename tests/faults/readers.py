"""Every reader of the project, with a valid file to damage and the function that reads it."""

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.info import main as info
from lora_adapters.convert.programs.info import as_text, facts
from lora_adapters.convert.storage.checkpoint import Checkpoint
from lora_adapters.train.data.cache_files import (
    CachedLatents,
    LatentsRequest,
    latents_fit,
    read_latents,
    read_text,
    text_fits,
    write_latents,
    write_text,
)
from lora_adapters.train.data.config import SubsetConfig, load_data_config
from lora_adapters.train.data.image_files import FileSource, open_image, size_if_whole
from lora_adapters.train.data.metadata_file import metadata_candidates
from lora_adapters.train.data.sources import load_subset, read_caption
from lora_adapters.train.data_error import DataError
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.generation import options as generate_options
from lora_adapters.train.generation.prompt_lines import numbered_lines, read_prompt_file
from lora_adapters.train.generation.requests import requests
from lora_adapters.train.options.arguments import parse
from lora_adapters.train.training.checkpoints import Position, load_state, save_state
from lora_adapters.train.training.samples import read_prompts
from lora_adapters.train.training.trackers import read_sections

ERRORS = (AdapterError, DataError, TrainingError)
TINY = Path(__file__).parents[2] / "examples" / "tiny-sd"


@dataclass(frozen=True)
class Reader:
    """`file` is damaged, then `read` is called; `shares` is for readers of the same files in one folder."""

    name: str
    file: Path
    read: Callable[[], object]


def small_adapter(alpha: float = 2.0, components: tuple[str, ...] = ("unet", "text_encoder")) -> Adapter:
    """An adapter with two modules per component, rank 2."""
    paths = {
        "unet": ("mid_block.attentions.0.proj_in", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"),
        "text_encoder": ("text_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.self_attn.k_proj"),
    }
    g = torch.Generator().manual_seed(1)
    pair = lambda: LowRank(torch.randn(2, 6, generator=g), torch.randn(5, 2, generator=g), alpha)  # noqa: E731
    modules = {ModuleName(part, path): pair() for part in components for path in paths[part]}
    return Adapter(modules, {"ss_network_module": "networks.dylora", "ss_network_args": '{"unit": "1"}'})


def _loaded(path: Path) -> None:
    """Use an adapter as `info` and a conversion do: read all mapped tensors, and print all facts."""
    adapter = Adapter.load(path)
    as_text(facts(adapter, path))
    adapter.to(torch.float32).scale(0.5).with_common_alpha()


def _loaded_of_other_kinds(path: Path) -> None:
    """The same for adapters with other deltas than low-rank pairs, which are written unchanged."""
    adapter = Adapter.load(path)
    as_text(facts(adapter, path))
    adapter.save(path.with_name("again.safetensors"))


def _convert(main: Callable[[list[str]], int], argv: list[str]) -> None:
    """Run a program in this process. A refusal must be one line and status 1."""
    said, shown = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
        status = main(argv)
    if status == 0:
        return
    assert status == 1, status
    lines = [line for line in said.getvalue().splitlines() if not line.startswith("writing")]
    assert len(lines) == 1, said.getvalue()
    assert lines[0].startswith("error: "), lines
    raise AdapterError(lines[0])


def _checkpoint_tensors() -> dict[str, torch.Tensor]:
    unet = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    text = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    return {unet: torch.randn(5, 6), text: torch.randn(5, 6), "first_stage_model.x": torch.randn(3)}


def _weighed(path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    assert checkpoint.base_version
    for module, file in checkpoint.modules.items():
        checkpoint.weight(module, file).float().sum()


def adapters(folder: Path) -> Iterator[Reader]:
    """Readers of adapters: Adapter.load for each format, and the programs that show and convert them."""
    from lora_adapters.convert.convert_format import main as convert

    adapter = small_adapter()
    for name in ("kohya.safetensors", "kohya.pt", "diffusers.safetensors"):
        path = adapter.save(folder / name, name.partition(".")[0])
        yield Reader(name, path, lambda path=path: _loaded(path))
    table = dict(torch.load(folder / "kohya.pt", weights_only=True))
    torch.save(table, folder / "old.ckpt", _use_new_zipfile_serialization=False)
    yield Reader("old.ckpt", folder / "old.ckpt", lambda: _loaded(folder / "old.ckpt"))
    from safetensors.torch import save_file

    from lora_adapters.convert.formats.cloneofsimo import _walk, to_tensors

    g = torch.Generator().manual_seed(1)
    layers = {
        ModuleName("text_encoder", path): LowRank(torch.randn(2, 6, generator=g), torch.randn(5, 2, generator=g), 2.0)
        for path in _walk("text_encoder", ["CLIPAttention"])[:8]
    }
    save_file(*(lambda pair: (pair[0], folder / "simo.safetensors", pair[1]))(to_tensors(layers, "sd", {})))
    block = "lora_unet_mid_block_attentions_0_transformer_blocks_0"
    kinds = {
        f"{block}_attn1_to_q": {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)},
        f"{block}_attn1_to_k": {"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)},
        f"{block}_attn1_to_v": {"lora_down.weight": (2, 8), "lora_up.weight": (8, 2), "dora_scale": (1, 8)},
        f"{block}_norm1": {"w_norm": (8,), "b_norm": (8,)},
        f"{block}_attn2_to_q": {"diff": (8, 8), "diff_b": (8,)},
    }
    mixed = {
        f"{name}.{end}": torch.randn(*shape, generator=g)
        for name, parts in kinds.items()
        for end, shape in parts.items()
    }
    mixed |= {f"{name}.alpha": torch.tensor(1.0) for name in list(kinds)[:3]}
    whole = folder / "lycoris.safetensors"
    save_file(mixed, whole)
    yield Reader(whole.name, whole, lambda: _loaded_of_other_kinds(whole))
    yield Reader("simo.safetensors", folder / "simo.safetensors", lambda: _loaded(folder / "simo.safetensors"))
    metadata = {"unet.r": 2, "unet.lora_alpha": 2, "unet.rank_pattern": {}, "unet.alpha_pattern": {"^mid_block": 4}}
    tensors = {f"unet.mid_block.attentions.0.proj_in.lora_{h}.weight": torch.randn(2, 2) for h in "AB"}
    save_file(tensors, folder / "metadata.safetensors", {"lora_adapter_metadata": json.dumps(metadata)})
    yield Reader(
        "metadata.safetensors", folder / "metadata.safetensors", lambda: _loaded(folder / "metadata.safetensors")
    )
    adapter.save(folder / "peft", "peft")
    for file in ("unet/adapter_config.json", "unet/adapter_model.safetensors"):
        yield Reader(f"peft/{file}", folder / "peft" / file, lambda: _loaded(folder / "peft"))
    small_adapter(components=("unet",)).save(folder / "flat", "peft")
    flat = folder / "flat" / "unet"
    yield Reader("flat/adapter_config.json", flat / "adapter_config.json", lambda: _loaded(flat))
    cli = adapter.save(folder / "cli.safetensors")
    yield Reader("info", cli, lambda: _convert(info, [str(cli)]))
    kept = folder / "kept.safetensors"

    def to_diffusers() -> None:
        """A refused source leaves the target as it was."""
        kept.write_bytes(b"precious")
        try:
            _convert(convert, ["--model", str(cli), "--save_to", str(kept), "--format", "diffusers"])
        except AdapterError:
            assert kept.read_bytes() == b"precious"
            raise
        finally:
            assert not list(folder.glob("*.partial"))

    yield Reader("convert", cli, to_diffusers)


def checkpoints(folder: Path) -> Iterator[Reader]:
    """Readers of base models in files."""
    from safetensors.torch import save_file

    tensors = _checkpoint_tensors()
    save_file(tensors, folder / "model.safetensors")
    torch.save({"state_dict": tensors, "global_step": 3}, folder / "model.ckpt")
    for name in ("model.safetensors", "model.ckpt"):
        yield Reader(name, folder / name, lambda path=folder / name: _weighed(path))


def data(folder: Path) -> Iterator[Reader]:
    """Readers of images, captions, caches and their configuration."""
    images = folder / "images"
    images.mkdir()
    for number, kind in enumerate(("png", "jpg", "webp")):
        Image.new("RGB", (64, 48), (10 * number, 0, 0)).save(images / f"{number}.{kind}")
    (folder / "data.toml").write_text(
        "[general]\nresolution = [64, 64]\nshuffle_caption = true\n[[datasets]]\nbatch_size = 2\nenable_bucket = true\n"
        "min_bucket_reso = 32\n[[datasets.subsets]]\nimage_dir = 'images'\nnum_repeats = 2\n"
        "caption_dropout_rate = 0.1\ncustom_attributes = {a = 1}\n"
    )
    subsets = [{"image_dir": "images", "num_repeats": 2, "caption_extension": ".txt", "keep_tokens": 1}]
    table = {"general": {"resolution": 64}, "datasets": [{"batch_size": 1, "subsets": subsets}]}
    (folder / "data.json").write_text(json.dumps(table))
    for name in ("data.toml", "data.json"):
        yield Reader(name, folder / name, lambda path=folder / name: load_data_config({"dataset_config": str(path)}))
    (folder / "meta.json").write_text(json.dumps({"0": {"caption": "a", "tags": "b"}, "1.jpg": {"tags": "c, d"}}))
    (folder / "meta.jsonl").write_text('{"image_path": "0.png", "caption": "a"}\n{"image_path": "1.jpg"}\n')
    for name in ("meta.json", "meta.jsonl"):
        subset = SubsetConfig(image_dir=str(images), metadata_file=str(folder / name))
        yield Reader(name, folder / name, lambda subset=subset: metadata_candidates(subset))
    caption = images / "0.txt"
    caption.write_text("a red {disc|square}\nsecond line, é\n")
    yield Reader(
        "caption", caption, lambda: (read_caption(caption, all_lines=True), read_caption(caption, all_lines=False))
    )
    info_cache = images / "metadata_cache.json"
    known = {"0.png": {"resolution": [64, 48], "modified": None, "caption": ""}, "1.jpg": {"resolution": [64, 48]}}
    info_cache.write_text(json.dumps(known))
    cached = SubsetConfig(image_dir=str(images), cache_info=True)
    yield Reader("metadata_cache.json", info_cache, lambda: load_subset(cached))
    for kind in ("png", "jpg", "webp"):
        source = FileSource(str(folder / f"image.{kind}"))
        Image.effect_noise((64, 48), 50).convert("RGB").save(source.path)
        yield Reader(f"image.{kind}", Path(source.path), lambda s=source: (size_if_whole(s), open_image(s)))
    wanted = LatentsRequest((64, 48), (64, 48), True, True, "vae")
    latents, text = str(folder / "a_0064x0048_sd.npz"), str(folder / "a_te_outputs.npz")
    write_latents(latents, CachedLatents(torch.randn(4, 6, 8), torch.randn(4, 6, 8), torch.rand(48, 64)), wanted)
    yield Reader("latents", Path(latents), lambda: (latents_fit(latents, wanted), read_latents(latents, (64, 48))))
    write_text(text, {"hidden": torch.randn(77, 8)}, "a caption", "encoder")
    shapes = {"hidden": torch.Size((77, 8))}
    yield Reader("text", Path(text), lambda: (text_fits(text, "a caption", "encoder", shapes), read_text(text)))


def training(folder: Path) -> Iterator[Reader]:
    """Readers of states, settings and prompts of training runs."""
    state = {
        "weights": {"unet.x.lora_A.weight": torch.randn(2, 6)},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 6)}},
            "param_groups": [{"lr": 0.1}],
        },
        "schedule": {"last_epoch": 3},
        "scaler": None,
    }
    save_state(folder / "x-state", state, Position(3, 1, 2, 8, 7))
    for name in ("state.pt", "train_state.json"):
        yield Reader(name, folder / "x-state" / name, lambda: load_state(folder / "x-state"))
    (folder / "prompts.txt").write_text("a cat --w 64 --h 64 --d 3 --s 5 --l 7.5 --n bad\n# comment\na dog --ss ddim\n")
    (folder / "prompts.toml").write_text(
        '[prompt]\nwidth = 64\nheight = 64\nscale = 7.5\n[[prompt.subset]]\nprompt = "a cat"\nseed = 3\n'
        '[[prompt.subset]]\nprompt = "a dog"\nsample_steps = 4\n'
    )
    (folder / "prompts.json").write_text(json.dumps([{"prompt": "a cat", "width": 64, "seed": 1}, {"prompt": "dog"}]))
    for kind in ("txt", "toml", "json"):
        path = folder / f"prompts.{kind}"
        yield Reader(path.name, path, lambda path=path: read_prompts(path))
    options = generate_options.parse([])
    drawn = folder / "drawn.txt"
    drawn.write_text(
        "a cat --w 64 --h 72 --s 9 --d 3 --l 2.5 --n bad --am 0.5,-1 --rank 4 --ss euler --f a.png\n# no\n"
    )
    yield Reader(
        "generate --from_file",
        drawn,
        lambda: requests(options, [*numbered_lines(read_prompt_file(drawn, "--from_file"), drawn)]),
    )
    (folder / "run.toml").write_text(
        "[any]\nseed = 1\nlearning_rate = 1e-4\ntext_encoder_lr = [1e-5, 2e-5]\nlr_warmup_steps = 0.1\n"
        '[more]\nresolution = [64, 32]\nnetwork_dim = 4\nnetwork_args = ["a=b"]\ncache_latents = true\n'
        'loss_type = "huber"\n'
    )
    yield Reader("run.toml", folder / "run.toml", lambda: parse([f"--config_file={folder / 'run.toml'}"]))
    (folder / "log.toml").write_text('[wandb]\nname = "x"\n')
    yield Reader("log.toml", folder / "log.toml", lambda: read_sections(folder / "log.toml"))


def every(folder: Path) -> list[Reader]:
    """All readers, each group with its valid files in its own folder."""
    found = []
    for make in (adapters, checkpoints, data, training):
        place = folder / make.__name__
        place.mkdir()
        found += make(place)
    return found
