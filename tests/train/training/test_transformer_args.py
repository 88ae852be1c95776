"""kohya's network_args for Flux.1 and SD3: ranks of kinds of layers, and which blocks are trained."""

import re

import pytest

from lora_adapters.convert.errors import AdapterError
from lora_adapters.train.models.registry import FAMILIES
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.adapters import lora_layers, options
from lora_adapters.train.training.setup import prepare
from lora_adapters.train.training.transformer_args import translated

from ..transformers import build_flux, build_sd3


def ranks(basics, folder, args, **others) -> dict[str, int]:
    run = prepare(
        settings(
            **basics
            | {"pretrained_model_name_or_path": str(folder), "network_args": args, "network_train_unet_only": True}
            | others
        )
    )
    return {name.path: layer.r["default"] for name, layer in lora_layers(run.trained).items()}


def test_each_kind_of_layer_of_flux_has_its_rank(basics, tmp_path) -> None:
    kinds = {
        "img_attn_dim": 1, "txt_attn_dim": 3, "img_mlp_dim": 4, "txt_mlp_dim": 5, "img_mod_dim": 6, "txt_mod_dim": 7,
        "single_dim": 8, "single_mod_dim": 9,
    }  # fmt: skip
    found = ranks(basics, build_flux(tmp_path / "m"), [f"{name}={rank}" for name, rank in kinds.items()])
    wanted = {
        "attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1, "attn.to_out.0": 1,
        "attn.add_q_proj": 3, "attn.add_k_proj": 3, "attn.add_v_proj": 3, "attn.to_add_out": 3,
        "ff.net.0.proj": 4, "ff.net.2": 4, "ff_context.net.0.proj": 5, "ff_context.net.2": 5,
        "norm1.linear": 6, "norm1_context.linear": 7,
    }  # fmt: skip
    single = {"attn.to_q": 8, "attn.to_k": 8, "attn.to_v": 8, "proj_mlp": 8, "proj_out": 8, "norm.linear": 9}
    assert found == {
        **{f"transformer_blocks.{n}.{path}": rank for n in range(2) for path, rank in wanted.items()},
        **{f"single_transformer_blocks.{n}.{path}": rank for n in range(2) for path, rank in single.items()},
    }


def test_each_kind_of_layer_of_sd3_has_its_rank(basics, tmp_path) -> None:
    kinds = {"context_attn_dim": 1, "context_mlp_dim": 3, "context_mod_dim": 4, "x_attn_dim": 5, "x_mlp_dim": 0}
    found = ranks(basics, build_sd3(tmp_path / "m", dual=(0,)), [f"{name}={rank}" for name, rank in kinds.items()])
    first = {path.removeprefix("transformer_blocks.0."): rank for path, rank in found.items() if ".0." in path[:21]}
    assert first == {
        "attn.to_q": 5, "attn.to_k": 5, "attn.to_v": 5, "attn.to_out.0": 5,
        "attn2.to_q": 5, "attn2.to_k": 5, "attn2.to_v": 5, "attn2.to_out.0": 5,
        "attn.add_q_proj": 1, "attn.add_k_proj": 1, "attn.add_v_proj": 1, "attn.to_add_out": 1,
        "ff_context.net.0.proj": 3, "ff_context.net.2": 3, "norm1.linear": 2, "norm1_context.linear": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("args", "blocks"),
    [
        (["train_double_block_indices=1"], {"D1", "S0", "S1"}),
        (["train_double_block_indices=none", "train_single_block_indices=0"], {"S0"}),
        (["train_blocks=single"], {"S0", "S1"}),
        (["train_blocks=double", "split_qkv=True"], {"D0", "D1"}),
        (["train_double_block_indices=0-1", "train_single_block_indices=all"], {"D0", "D1", "S0", "S1"}),
    ],
)
def test_only_the_chosen_blocks_are_trained(basics, tmp_path, args, blocks) -> None:
    found = ranks(basics, build_flux(tmp_path / "m"), args)
    names = {("S" if path.startswith("single") else "D") + re.search(r"\.(\d+)\.", path)[1] for path in found}
    assert names == blocks


def test_the_users_own_patterns_come_first() -> None:
    args = {"img_attn_dim": "4", "network_reg_dims": r".*\.0\..*=8", "unit": "2"}
    found = translated(args, FAMILIES["flux"])
    assert found["network_reg_dims"].startswith(r".*\.0\..*=8,transformer_blocks")
    assert found["unit"] == "2"
    assert translated(args, FAMILIES["sd"]) == args


def test_every_option_is_read_into_a_config() -> None:
    for family in (FAMILIES["flux"], FAMILIES["sd3"]):
        args = {**dict.fromkeys(family.rank_args, "3"), **dict.fromkeys(family.block_args, "0,2-3")}
        asked = options(settings(network_module="networks.lora", network_args=args), family)
        assert len(asked.config.reg_dims) == len(args)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("img_attn_dim", "x", "it takes a rank"),
        ("img_attn_dim", "-1", "it takes a rank"),
        ("train_double_block_indices", "a-b", "block numbers"),
        ("train_single_block_indices", "1-900", "block numbers"),
        ("train_blocks", "triple", "all, double, single"),
        ("in_dims", "[4,2,2,2,4]", "outside of the blocks"),
    ],
)
def test_wrong_values_are_named(name, value, said) -> None:
    with pytest.raises(AdapterError, match=said):
        translated({name: value}, FAMILIES["flux"])
