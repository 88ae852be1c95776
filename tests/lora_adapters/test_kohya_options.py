"""network_args and the other network options: what each of them means, on SD1.5's and SDXL's real module names."""

import json
import math
from pathlib import Path

import pytest

from lora_adapters import C3LierConfig, DyLoraConfig, LierLaConfig
from lora_adapters.block_lr import block_lr_weights
from lora_adapters.convert.errors import AdapterError
from lora_adapters.kohya_options import MODULES, network_options
from lora_adapters.target_modules import RankAlpha, RankRule

GOLDEN = Path(__file__).parents[1] / "golden" / "modules"


def golden_rows(size: str) -> list[dict]:
    table = json.loads((GOLDEN / f"kohya_modules_{size}.json").read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def ranks(size: str = "sd15", **options) -> dict[str, RankAlpha]:
    """Rank and alpha of every U-Net module under these options, by its path."""
    from torch import nn

    architecture = "sdxl" if size == "sdxl" else "sd"
    config = network_options(architecture=architecture, **options).config
    rows = [row for row in golden_rows(size) if row["component"] == "unet"]
    rule = RankRule(config, [row["diffusers_module"] for row in rows])
    layers = {"linear": nn.Linear(1, 1), "conv1x1": nn.Conv2d(1, 1, 1), "conv3x3": nn.Conv2d(1, 1, 3)}
    return {
        row["diffusers_module"]: rule(row["diffusers_module"], layers[row["kind"]])
        for row in rows
        if row["lierla"] or config.conv
    }


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # block 1
RESNET = "down_blocks.0.resnets.0.conv1"  # block 1, 3x3
TIME = "down_blocks.0.resnets.0.time_emb_proj"  # block 1, linear
MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"  # block 12


def test_network_module_under_each_of_its_names() -> None:
    kinds = {name: type(network_options(name).config) for name in MODULES}
    assert kinds["networks.lora"] is kinds["network.lora"] is kinds["lierla"] is LierLaConfig
    assert kinds["networks.dylora"] is kinds["network.dylora"] is kinds["dylora"] is DyLoraConfig
    assert kinds["c3lier"] is C3LierConfig
    assert type(network_options("networks.lora", network_args={"conv_dim": "4"}).config) is C3LierConfig


def test_network_dim_and_alpha_are_4_and_1_unless_given() -> None:
    assert ranks()[ATTENTION] == RankAlpha(4, 1)
    assert ranks(network_dim=32, network_alpha=16)[ATTENTION] == RankAlpha(32, 16)
    assert len(ranks()) == 192
    assert len(ranks("sdxl")) == 722


def test_an_alpha_of_0_is_the_rank() -> None:
    assert ranks(network_dim=8, network_alpha=0)[ATTENTION] == RankAlpha(8, 8)
    found = ranks(network_alpha=0, network_args={"conv_dim": "2", "conv_alpha": "0"})
    assert (found[ATTENTION], found[RESNET]) == (RankAlpha(4, 4), RankAlpha(2, 2))
    dims = {"block_dims": ",".join(str(i) for i in range(25))}
    assert ranks(network_dim=9, network_alpha=0, network_args=dims)[MIDDLE] == RankAlpha(12, 12)
    assert network_options(network_dim=9, network_alpha=0, network_args=dims).config.lora_alpha == 9
    assert ranks(network_dim=9, network_args=dims | {"block_alphas": ",".join("0" * 25)})[MIDDLE] == RankAlpha(12, 12)


def test_conv_dim_and_conv_alpha_are_for_3x3_alone() -> None:
    found = ranks(network_dim=8, network_alpha=4, network_args={"conv_dim": "2"})
    assert len(found) == 278
    assert found[RESNET] == RankAlpha(2, 1)  # conv_alpha is 1, not network_alpha
    assert found[TIME] == found[ATTENTION] == RankAlpha(8, 4)
    assert ranks(network_args={"conv_dim": "2", "conv_alpha": "0.5"})[RESNET] == RankAlpha(2, 0.5)


def test_block_lists() -> None:
    dims = ["4"] * 25
    dims[1], dims[12] = "7", "0"
    alphas = [str(0.5 * i) for i in range(25)]
    lists = {"block_dims": ",".join(dims), "block_alphas": ",".join(alphas)}
    found = ranks(network_dim=9, network_args=lists)
    assert found[ATTENTION] == RankAlpha(7, 0.5)
    assert found[MIDDLE].rank == 0
    conv = {"conv_block_dims": ",".join(["3"] * 25), "conv_block_alphas": ",".join(alphas)}
    found = ranks(network_dim=9, network_args=lists | conv)
    assert found[RESNET] == RankAlpha(3, 0.5)
    assert found[TIME] == RankAlpha(7, 0.5)


def test_block_lists_alone_count_too() -> None:
    """kohya's trainer ignores these without block_dims and without a word."""
    alphas = ",".join(["3"] * 25)
    assert ranks(network_args={"block_alphas": alphas})[ATTENTION] == RankAlpha(4, 3)
    assert ranks(network_args={"conv_block_dims": ",".join(["2"] * 25)})[RESNET] == RankAlpha(2, 1)
    given = {"conv_dim": "5", "conv_block_alphas": alphas}
    assert ranks(network_args=given)[RESNET] == RankAlpha(5, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network_dim": 0}, "network_dim is 0: a rank is at least 1"),
        ({"network_args": {"block_dims": "1,2"}}, "block_dims has 2 values, SD1.x and SD2.x has 25 blocks"),
        ({"network_args": {"block_dims": ",".join("1" * 25)}, "architecture": "sdxl"}, "SDXL has 23 blocks"),
        ({"network_args": {"block_alphas": ",".join(["-1"] * 25)}}, "negative value -1"),
        ({"network_args": {"block_dims": "a"}}, "it takes whole numbers"),
        ({"network_args": {"block_alphas": "1,nan"}}, "it takes numbers"),
        ({"network_args": {"loraplus_lr_ratio": "inf"}}, "loraplus_lr_ratio=inf: it takes a number"),
        ({"network_args": {"down_lr_weight": "1,nan"}}, "down_lr_weight is '1,nan': give numbers"),
        ({"network_args": {"conv_dim": "2.5"}}, "conv_dim=2.5: it takes a whole number"),
        ({"network_module": "dylora", "network_dim": 6, "network_args": {"unit": "4"}}, "unit 4 does not divide r 6"),
        ({"network_module": "dylora", "network_args": {"unit": "0"}}, "unit is 0"),
        ({"network_module": "dylora", "network_args": {"rank_scaling": "big"}}, "one of"),
        ({"network_args": {"mid_lr_weight": "much"}}, "give numbers with commas"),
        ({"network_module": "networks.lora_fa"}, "give networks.lora, which trains both factors"),
        ({"network_module": "networks.dylroa"}, "the nearest known name is networks.dylora"),
    ],
)
def test_mistakes(options, message) -> None:
    with pytest.raises(AdapterError, match=message):
        network_options(**options)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"unit": "4"}, "unit is ignored: it is for DyLoRA"),
        ({"block_lr_zero_threshold": "0.1"}, "block_lr_zero_threshold is ignored: it goes with down_lr_weight, "),
        ({"conv_dims": "4"}, "conv_dims is ignored: there is no such option; the nearest known name is conv_dim"),
        ({"algo": "lora"}, "algo is ignored: it is for LyCORIS: give network_module lycoris.kohya"),
    ],
)
def test_network_args_without_effect_are_said_and_ignored(args, reason, caplog) -> None:
    assert network_options(network_args=args) == network_options()
    assert f"network_args {reason}" in caplog.text


def test_dylora_options() -> None:
    args = {"unit": "4", "rank_scaling": "rank", "freeze_lower": "True", "rank_sampling": "uniform"}
    config = network_options("networks.dylora", 16, 8, args).config
    assert isinstance(config, DyLoraConfig)
    assert (config.r, config.lora_alpha, config.unit) == (16, 8, 4)
    assert (config.rank_scaling, config.freeze_lower, config.rank_sampling) == ("rank", True, "uniform")
    other = network_options("networks.dylora").config
    assert (other.rank_scaling, other.freeze_lower, other.rank_sampling) == ("sqrt", False, "spread")


def test_down_mid_up_lr_weights_and_presets() -> None:
    weights = block_lr_weights("sd", "sine+0.25", "0.5", "1,,3")
    sine = [math.sin(math.pi * i / 22) + 0.25 for i in range(12)]
    assert weights == pytest.approx([*sine, 0.5, 1, 0, 3, *[1] * 9])
    steps = [i / 11 for i in range(12)]
    expected = {"linear": steps, "reverse_linear": steps[::-1], "zeros": [0] * 12}
    expected["cosine"] = [math.cos(math.pi * t / 2) if t < 1 else 0 for t in steps]
    for name, values in expected.items():
        assert block_lr_weights("sd", down=name)[:12] == pytest.approx(values, abs=1e-12)
    sdxl = block_lr_weights("sdxl", "2", "1,0,1", "linear")
    assert sdxl == pytest.approx([1, *[2] * 9, 1, 0, 1, *[i / 8 for i in range(9)], 1])
    with pytest.warns(UserWarning, match="only the first 12 are used"):
        assert block_lr_weights("sd", [2] * 13)[:13] == [2] * 12 + [1]


def test_block_lr_zero_threshold_leaves_blocks_out() -> None:
    args = {"down_lr_weight": "linear", "block_lr_zero_threshold": "0.5", "conv_dim": "3"}
    asked = network_options(network_args=args)
    assert asked.block_lr_weights is not None
    assert asked.block_lr_weights[:12] == pytest.approx([*[0.0] * 6, *[i / 11 for i in range(6, 12)]])
    found = ranks(network_args=args)
    assert found[ATTENTION].rank == found[RESNET].rank == 0
    assert found[MIDDLE].rank == 4


def test_dropouts_and_loraplus_ratios_are_passed_on() -> None:
    names = ("rank_dropout", "module_dropout", "loraplus_lr_ratio", "loraplus_unet_lr_ratio")
    names = (*names, "loraplus_text_encoder_lr_ratio")
    asked = network_options(network_args={name: f"0.{i}" for i, name in enumerate(names, 1)})
    assert [getattr(asked, name) for name in names] == [0.1, 0.2, 0.3, 0.4, 0.5]
