"""The tables from kohya's calls to the ones here: every line of code in their right column, run on a tiny pipeline."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_adapters import Adapter, C3LierConfig, DyLoraConfig, LierLaConfig, add_adapter, param_groups
from tests.convert.checkpoints import GOLDEN, original
from tests.lora_adapters.conftest import expected, make_pipeline
from tests.lora_adapters.golden_outputs import error, outputs
from tests.lora_adapters.pipelines import add_to_weights

from .blocks import PAGES

FILE = GOLDEN / "sd15" / "c3lier.safetensors"
OTHER = GOLDEN / "sd15" / "lierla.safetensors"
ROW = re.compile(r"^\| (.*) \| (.*) \|$", re.MULTILINE)
# The weight of adapter "mine" that the pipeline works with after a row, or None where that is not the point.
WEIGHTS = {
    "network, sd = create_network_from_weights(0.5": 0.5, "network.set_multiplier": 0.7,
    "network.merge_to(te": 1.0, "network.backup_weights": 1.0,
    "create_network(1.0": None, "networks.dylora": None, "network.prepare": None, "network.save": None,
    "network = create_network_from_weights": 1.0, "network.apply_to(0.5)": 0.5, "network.unapply_to": 0.0,
    "network.merge_to(0.5)": 0.5, "network.restore_from": 1.0, "merge_lora_weights": 0.5,
}  # fmt: skip


def rows():
    found = []
    text = (PAGES / "generate.md").read_text(encoding="utf-8")
    table = text[text.index("| kohya") :]
    for left, right in ROW.findall(table[: table.index("\n\n", table.rindex("| kohya"))]):
        if left.startswith("`") and "`" in right:
            found.append(pytest.param(left, re.findall(r"`([^`]+)`", right), id=left[1:40]))
    return found


def with_weight(weight, other=0.0):
    """What the pipeline puts out when the changes of FILE and OTHER, times these, are in its very weights."""
    pipe = make_pipeline()
    add_to_weights(pipe, Adapter.load(FILE), weight)
    add_to_weights(pipe, Adapter.load(OTHER), other)
    return outputs(pipe, expected("sd15"))


@pytest.mark.parametrize(("left", "calls"), rows())
def test_every_call_of_the_table_does_it(left, calls, tmp_path):
    pipe, golden = make_pipeline(), expected("sd15")
    model, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    save_file(original("sd1"), model)
    names = {
        "pipe": pipe, "file": FILE, "sd": load_file(FILE), "model": model, "out": out, "lr": 1e-4, "unet_lr": 1e-4,
        "te_lr": 5e-5, "metadata": {}, "dtype": torch.float16, "Adapter": Adapter, "param_groups": param_groups,
        "add_adapter": add_adapter,
        "C3LierConfig": C3LierConfig, "LierLaConfig": LierLaConfig, "DyLoraConfig": DyLoraConfig,
    }  # fmt: skip
    if "prepare_optimizer" in left:
        for part in (pipe.unet, pipe.text_encoder):
            add_adapter(part, LierLaConfig(r=2), "mine")
    elif not any("load_lora_weights" in call or "add_adapter" in call for call in calls):
        pipe.load_lora_weights(FILE, adapter_name="mine")
    if "restore_from" in left:
        pipe.fuse_lora()
    if "save_weights" in left:
        names["file"] = tmp_path / "saved.safetensors"
    (weight,) = {WEIGHTS[start] for start in sorted(WEIGHTS, key=len) if left[1:].startswith(start)}
    for call in calls:
        if '"b"' in call:
            pipe.load_lora_weights(OTHER, adapter_name="b")
            exec(call, names)
            assert error(outputs(pipe, golden), with_weight(0.7, 0.5), with_weight(0.0)) < 1e-3
            pipe.set_adapters("mine", 0.7)
            continue
        if call == "pipe.enable_lora()":  # the way back, or for good: the one after the other
            exec(call, names)
            assert error(outputs(pipe, golden), with_weight(1.0), with_weight(0.0)) < 1e-3
            continue
        exec(call, names)
        if call == "pipe.disable_lora()":
            assert error(outputs(pipe, golden), with_weight(0.0), with_weight(1.0)) < 1e-3
    if weight is not None:
        assert error(outputs(pipe, golden), with_weight(weight), with_weight(0.0 if weight else 1.0)) < 1e-3
    if "merge_into" in " ".join(calls):
        assert out.stat().st_size == model.stat().st_size
    if "save_weights" in left:
        assert Adapter.load(names["file"]).modules.keys() == Adapter.load(FILE).modules.keys()
    if "create_network(" in left:
        config = pipe.unet.peft_config["mine"]
        assert (config.r, config.lora_alpha) == (16, 8)
