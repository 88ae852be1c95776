"""Every block of commands or Python on the documentation's pages runs, each in a fresh process; slow.

The pages name files that a reader has: here they are small ones of the kind that the page speaks of. A fragment of
Python that goes on with a `pipe` or a `unet` runs behind lines that make these. Recipes, `generate` and
`training-images` have tests of their own.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from lora_adapters import Adapter
from lora_adapters.convert import ModuleName
from lora_adapters.convert.deltas import Hadamard
from lora_adapters.convert.models.merging import merge_into_model

from .blocks import PAGES, REPOSITORY, blocks
from .test_readme import FASTER, clone, quickstart_file, run_shell  # noqa: F401  # fixtures

OTHER_TESTS = {"recipes", "generate", "training-images"}
NOT_RUN = {  # what a block has in it, and why it is not run
    "pip install": "installs from the net",
    "lora-adapters train ...": "leaves options to the reader",
    "(the same options)": "leaves options to the reader",
    "a/diffusers/folder ...": "leaves options to the reader",
    "me/": "needs the Hub",
    "black-forest-labs/": "needs a model of 24 GB",
    "--dataset_config=delft.toml": "trains for minutes; see tests/examples/test_tiny_flux",
    "tiny-flux-style/dylora.safetensors": "goes on with what style.py has trained for minutes",
    "lora-adapters studio": "goes on until it is stopped; see test_browser",
}
TINY = REPOSITORY / "examples" / "tiny-sd"
NAMES = [
    "a",
    "b",
    "any_lora",
    "big",
    "dial",
    "dylora",
    "first",
    "second",
    *(f"run-{n:06d}" for n in (8, 9, 10)),
]
PREAMBLE = {
    "pipe": """
import torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained("examples/tiny-sd", dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
torch.compile = lambda model: model  # takes minutes, and has tests of its own
""",
    "unet": """
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel
from lora_adapters import DyLoraConfig, add_adapter
unet = UNet2DConditionModel.from_pretrained("examples/tiny-sd", subfolder="unet")
text_encoder = CLIPTextModel.from_pretrained("examples/tiny-sd", subfolder="text_encoder")
for model in (unet, text_encoder):
    add_adapter(model, DyLoraConfig(r=8, lora_alpha=8, unit=2, sort_at=0.3), "default")
optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-4)
total_steps = 3
""",
}


def runnable():
    found = []
    for page in sorted(PAGES.glob("*.md")):
        for block in blocks(page):
            runs = block.language in ("sh", "python") and ">>>" not in block.text
            if runs and page.stem not in OTHER_TESTS and not any(words in block.text for words in NOT_RUN):
                found.append(pytest.param(page, block, id=f"{page.stem}-{block.line}"))
    return found


def test_what_is_not_run_is_there():
    text = "".join(block.text for page in PAGES.glob("*.md") for block in blocks(page))
    assert [words for words in NOT_RUN if words not in text] == []
    assert len(runnable()) > 15


@pytest.fixture(scope="module")
def files(tmp_path_factory, quickstart_file):  # noqa: F811
    """The models, adapters and embeddings that the pages name."""
    folder = tmp_path_factory.mktemp("files")
    delft = Adapter.load(quickstart_file)
    (folder / "sd-folder").symlink_to(TINY)
    merge_into_model(TINY, folder / "model.safetensors", [delft], [0.0])
    (folder / "base.safetensors").symlink_to(folder / "model.safetensors")
    merge_into_model(TINY, folder / "tuned.safetensors", [delft], [1.0])
    to_q = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    width = delft.pairs()[to_q].down.shape[1]
    parts = [torch.randn(width, 4), torch.randn(4, width), torch.randn(width, 4), torch.randn(4, width)]
    Adapter({to_q: Hadamard(*parts, alpha=1.0)}).save(folder / "loha.safetensors")
    parts_of_blocks = ("attn1", "attn2", "ff.net.0.proj")  # what cloneofsimo's trainer adapts
    kohya = delft.with_modules(
        {name: pair for name, pair in delft.pairs().items() if any(f".{part}" in name.path for part in parts_of_blocks)}
    )
    kohya.save(folder / "kohya.safetensors")
    kohya.save(folder / "cloneofsimo.safetensors", format="cloneofsimo")
    save_file({"<s1>": torch.randn(1, 32)}, folder / "kohya.s1.safetensors")
    query = "diffusion_model.blocks.0.self_attn.q"  # a layer of Wan
    save_file(
        {f"{query}.lora_A.weight": torch.randn(2, 16), f"{query}.lora_B.weight": torch.randn(16, 2)},
        folder / "wan.safetensors",
    )
    for name in NAMES:
        (folder / f"{name}.safetensors").symlink_to(quickstart_file)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("page", "block"), runnable())
def test_a_block_runs_alone(clone, files, page, block):  # noqa: F811
    for file in files.iterdir():
        (clone / file.name).symlink_to(file)
    for name in ("train", "tests"):
        (clone / name).symlink_to(REPOSITORY / name)
    data = next((one.text for one in blocks(page) if one.language == "toml"), None)
    if data:
        (clone / "dataset.toml").write_text(data, encoding="utf-8")
    text = block.text
    for pattern, fewer in FASTER:
        text = re.sub(pattern, fewer, text)
    if block.language == "sh":
        launcher = f'accelerate() {{ "{sys.executable}" -m accelerate.commands.accelerate_cli "$@"; }}\n'
        run_shell(f'{launcher}python() {{ "{sys.executable}" "$@"; }}\n{text}')
        return
    for name, made in PREAMBLE.items():
        if re.search(rf"\b{name}\b", text) and not re.search(rf"^{name} = ", text, re.MULTILINE):
            text = made + text
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{text}\n{done.stderr}"
