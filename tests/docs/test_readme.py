"""The recipes of the README and of the page with more, run as they stand: offline, on the small model, fewer steps."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from .blocks import PAGES, REPOSITORY, blocks

README = blocks(REPOSITORY / "README.md")
MORE = blocks(PAGES / "recipes.md")
NOT_RUN_HERE = ("pip install . && python examples/quickstart.py", 'pip install -e ".[test]"')
# What takes long and changes nothing of what a block shows.
FASTER = (
    (r"--max_train_steps=\d+", "--max_train_steps=2"),
    (r"num_inference_steps=\d+", "num_inference_steps=2"),
    (r"--steps \d+", "--steps 2"),
)


def under(*starts):
    """The blocks under the headings that begin so; each has some."""
    found = {start: [block for block in README if block.heading.startswith(start)] for start in starts}
    assert all(found.values()), found
    return [block for start in starts for block in found[start]]


def recipes(found):
    """The blocks of each heading: what a reader takes as one recipe."""
    return [
        [block for block in found if block.heading == heading]
        for heading in dict.fromkeys(one.heading for one in found)
    ]


def run_shell(text):
    """Run a block as bash runs it, with this Python's lora-adapters."""
    program = f'set -e; lora-adapters() {{ "{sys.executable}" -m lora_adapters.cli "$@"; }}\n'
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["bash", "-c", program + text], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run(chosen, names):
    """Run blocks in order, Python in one namespace; what the programs said."""
    said = ""
    for block in chosen:
        text = block.text
        for pattern, fewer in FASTER:
            text = re.sub(pattern, fewer, text)
        if block.language == "sh":
            said += run_shell(text)
        else:
            exec(compile("\n" * (block.line - 1) + text, str(REPOSITORY / "README.md"), "exec"), names)
    return said


@pytest.fixture(scope="module")
def quickstart_file(tmp_path_factory):
    """A DyLoRA as the quickstart makes it, with random numbers in place of trained ones."""
    from diffusers import UNet2DConditionModel

    from lora_adapters import Adapter, DyLoraConfig

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(REPOSITORY / "examples" / "tiny-sd" / "unet")
    config = DyLoraConfig(r=16, lora_alpha=16, conv_dim=16, conv_alpha=16, rank_scaling="constant")
    unet.add_adapter(config, adapter_name="delft")
    adapter = Adapter.from_models({"unet": unet}, "delft")
    drawn = adapter.map(lambda one: type(one)(one.down, torch.randn_like(one.up) / 50, one.alpha))
    return drawn.save(tmp_path_factory.mktemp("quickstart") / "delft.safetensors")


@pytest.fixture
def clone(tmp_path, monkeypatch, quickstart_file):
    """A folder that looks to the recipes like a clone in which the quickstart was run."""
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "delft.safetensors").symlink_to(quickstart_file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_load_dial_and_python(clone):
    from lora_adapters import Adapter

    run(under("1."), {})
    run(under("3."), {})
    names = {}
    run(under("In Python"), names)
    first, dialled = (np.asarray(Image.open(name)) for name in ("penguin.png", "penguin-rank4.png"))
    assert first.shape == dialled.shape
    assert (first != dialled).any()
    cut = Adapter.load("delft-rank4.safetensors")
    assert cut.rank == 4
    assert {one.rank for one in names["mix"].modules.values()} <= set(range(1, 17))
    forms = [Adapter.load(name) for name in ("mix.safetensors", "mix_diffusers.safetensors", "mix_peft")]
    name, one = next(iter(names["mix"].modules.items()))
    for form in forms:
        torch.testing.assert_close(form.modules[name].delta(), one.delta())
    new = Adapter.load("new.safetensors")
    assert set(new.components) == {"unet", "text_encoder"}
    assert new.dylora.unit == 4


def test_train(clone):
    from lora_adapters import Adapter

    run(under("2."), {})
    adapter = Adapter.load("trained/mine.safetensors")
    assert adapter.dylora.unit == 4
    assert adapter.rank == 16
    assert adapter.metadata["ss_num_train_images"] == "24"
    assert (clone / "trained" / "mine-report.html").exists()


def test_merge_and_extract(clone):
    from diffusers import StableDiffusionPipeline

    from lora_adapters import Adapter

    tiny = StableDiffusionPipeline.from_pretrained("examples/tiny-sd")
    given = Adapter.load("quickstart/delft.safetensors")
    said = run(under("4.", "5."), {})
    merged = StableDiffusionPipeline.from_pretrained("merged")
    assert merged.unet.state_dict().keys() == tiny.unet.state_dict().keys()
    found = Adapter.load("extracted.safetensors")
    assert found.modules.keys() == given.modules.keys()
    for name, one in found.modules.items():
        torch.testing.assert_close(one.delta(), 0.8 * given.modules[name].delta(), rtol=0, atol=2e-3)
    assert "rank 16" in said
    both = Adapter.load("both.safetensors")
    assert both.rank == 20


def test_more_recipes(clone):
    from lora_adapters import Adapter

    names, said = {}, ""
    for recipe in recipes(MORE):
        names = {}
        said += run(recipe, names)
        if "model" in names:
            assert type(names["model"].peft_config["default"]).__name__ == "DyLoraConfig"
    given = Adapter.load("quickstart/delft.safetensors")
    small, late, rest = (Adapter.load(f"{name}.safetensors") for name in ("small", "late", "rest"))
    assert sum(one.rank for one in small.modules.values()) < sum(one.rank for one in given.modules.values())
    assert "small.safetensors" in said
    assert [file.name for file in sorted((clone / "split").iterdir())] == [
        f"delft-{rank:04d}.safetensors" for rank in (4, 8, 16)
    ]
    assert {name.path.split(".")[0] for name in late.modules} == {"up_blocks"}
    for name, one in given.modules.items():
        wanted = torch.zeros(()) if name in late.modules else one.delta()
        torch.testing.assert_close(rest.modules[name].delta(), wanted.expand(one.delta().shape), rtol=0, atol=2e-3)
    assert len(list((clone / "smaller").glob("*+32x32.*"))) == 2 * len(list((clone / "smaller").glob("*+48x48.jpg")))


ALONE = [
    pytest.param(recipe, id=recipe[0].heading)
    for recipe in [*recipes(README), *recipes(MORE)]
    if not recipe[0].text.startswith(NOT_RUN_HERE)
]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ALONE)
def test_each_recipe_runs_alone(clone, recipe):
    """In a clone where nothing but the quickstart was run, each block by programs of its own."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    scripts = [block for block in recipe if block.language == "python"]
    for block in recipe:
        text = "".join(one.text for one in scripts) if block.language == "python" else block.text
        for pattern, fewer in FASTER:
            text = re.sub(pattern, fewer, text)
        if block.language == "sh":
            run_shell(text)
        elif block is scripts[-1]:
            done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{text}\n{done.stderr}"


def test_no_block_is_left_out():
    ours = under("1.", "2.", "3.", "4.", "5.", "In Python")
    left = [block for block in README if block not in ours and not block.text.startswith(NOT_RUN_HERE)]
    assert left == []


def test_links_lead_somewhere():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://)([^)#]+)", text)
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []
