"""Regular expressions that choose modules, ranks and learning rates, on the real models' layouts."""

import pytest

from lora_adapters import LierLaConfig, add_adapter, param_groups
from lora_adapters.convert.errors import AdapterError
from lora_adapters.kohya_options import network_options
from lora_adapters.module_patterns import left_out, names_in, tally
from tests.lora_adapters.conftest import make_pipeline
from tests.lora_adapters.test_kohya_options import ATTENTION, RESNET, ranks

SECOND = ATTENTION.replace("attn1", "attn2")


def test_exclude_leaves_out_and_include_makes_exceptions() -> None:
    """As in kohya's trainer, where both have to match the whole name."""
    args = {"exclude_patterns": "['.*attn[12].*', 'proj_in']", "include_patterns": "[r'.*attn1\\.to_q']"}
    found = ranks(network_args=args)
    kept = {path for path, decided in found.items() if decided.rank}
    assert ATTENTION in kept
    assert SECOND not in kept
    assert len(kept) == 16 + 16 * 2 + 16 * 2  # attn1.to_q, both of the feed-forward, proj_in and proj_out
    assert left_out(["a"], ["a.*"], ("ab",))
    assert not left_out(["a"], ["a.*"], ("a",))
    assert not left_out(None, ["a"], ("ab",))


def test_include_alone_leaves_out_all_else() -> None:
    found = ranks(network_args={"include_patterns": "['.*attn2.*']"})
    assert {path for path, decided in found.items() if decided.rank} == {path for path in found if "attn2" in path}


def test_a_pattern_without_a_list() -> None:
    found = ranks(network_args={"exclude_patterns": ".*attn2.*"})
    assert [found[path].rank for path in (ATTENTION, SECOND)] == [4, 0]


def test_ranks_by_pattern() -> None:
    """The first one that matches counts; alpha is network_alpha, also for convolutions; blocks' ranks are less."""
    args = {"network_reg_dims": ".*attn2.*=8,.*attn.*=0, .*conv1=6", "conv_dim": "2", "conv_alpha": "0.5"}
    found = ranks(network_alpha=3, network_args={**args, "block_dims": ",".join("5" * 25)})
    assert [found[path].rank for path in (SECOND, ATTENTION, RESNET)] == [8, 0, 6]
    assert found[SECOND].alpha == found[RESNET].alpha == 3
    other = RESNET.replace("conv1", "conv2")
    assert (found[other].rank, found[other].alpha) == (2, 0.5)
    assert found["down_blocks.0.resnets.0.time_emb_proj"].rank == 5
    assert ranks(network_alpha=0, network_args={"network_reg_dims": ".*=8"})[ATTENTION].alpha == 8


def test_sdxl_s_names_in_kohya_s_trainer_match_too() -> None:
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    found = ranks("sdxl", network_args={"network_reg_dims": r"input_blocks\.4\.1\..*=8"})
    assert found[path].rank == 8
    assert {path.split(".transformer")[0].rpartition(".proj")[0] or path.split(".transformer")[0]
            for path, decided in found.items() if decided.rank == 8} == {"down_blocks.1.attentions.0"}  # fmt: skip


def test_names_of_text_encoders() -> None:
    both = names_in(["encoder.layers.0.mlp.fc1"])("encoder.layers.0.mlp.fc1")
    assert both == ("encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1")


def test_counts() -> None:
    assert tally(["a.*", "ab", "c"], [("ab",), ("x", "ac"), ("c",)]) == {"a.*": 2, "ab": 0, "c": 1}


def test_an_adapter_with_patterns() -> None:
    """In a live model: modules that are left out are not wrapped, and the config says what was decided."""
    unet = make_pipeline("sd15").unet
    config = LierLaConfig(r=2, exclude_patterns=[".*attn2.*"], reg_dims={".*to_k": 3, ".*ff.*": 0})
    unet.add_adapter(config, adapter_name="a")
    decided = unet.peft_config["a"]
    assert not any("attn2" in path or ".ff." in path for path in decided.target_modules)
    layer = unet.get_submodule(ATTENTION.replace("to_q", "to_k"))
    assert layer.r == {"a": 3}
    assert unet.get_submodule(ATTENTION).r == {"a": 2}


def test_rates_by_pattern() -> None:
    pipe = make_pipeline("sd15")
    for model in (pipe.unet, pipe.text_encoder):
        add_adapter(model, LierLaConfig(r=2))
    rates = {r".*attn1\..*": 3.0, r".*attn2\..*": 0.0, r".*\.mlp\..*": 5.0}
    groups = param_groups(pipe.unet, [pipe.text_encoder], lr=1.0, loraplus_unet_lr_ratio=2.0, reg_lrs=rates)
    shown = {group["name"]: (group["lr"], len(group["params"])) for group in groups}
    layers = pipe.text_encoder.config.num_hidden_layers
    assert shown == {
        "unet": (1.0, 64),  # feed-forward, proj_in and proj_out: 4 in each of 16 blocks
        "unet plus": (2.0, 64),
        "unet_reg0": (3.0, 64),
        "unet_reg0 plus": (6.0, 64),
        "text_encoder": (1.0, 2 * 4 * layers),
        "text_encoder_reg2": (5.0, 2 * 2 * layers),
    }


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"exclude_patterns": "['(']"}, "exclude_patterns [(] is not a regular expression"),
        ({"include_patterns": "[1]"}, "include_patterns=.1.: it takes a list of regular expressions"),
        ({"network_reg_dims": "a"}, "network_reg_dims=a: it takes pattern=rank"),
        ({"network_reg_dims": "a=x"}, "network_reg_dims=a=x: it takes pattern=rank"),
        ({"network_reg_dims": "a=-1"}, "reg_dims a=-1: ranks are integers of at least 0"),
        ({"network_reg_lrs": "(=1e-4"}, "network_reg_lrs [(] is not a regular expression"),
        ({"network_reg_lrs": "a=-1"}, "network_reg_lrs=a=-1: a learning rate is at least 0"),
        ({"preset": "fll"}, "unknown preset fll"),
    ],
)
def test_what_cannot_be_meant(args, message) -> None:
    with pytest.raises(AdapterError, match=message):
        network_options(network_args=args)


def test_a_pattern_with_an_equals_sign() -> None:
    assert network_options(network_args={"network_reg_dims": "(?=.*attn).*=8"}).config.reg_dims == {"(?=.*attn).*": 8}
