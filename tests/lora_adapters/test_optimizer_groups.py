"""Learning rates end up at the weights they are meant for."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model

from lora_adapters import LierLaConfig, add_adapter, param_groups
from lora_adapters.block_lr import block_lr_weights
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.registry import by_class


def made_with(config: LoraConfig) -> UNet2DConditionModel:
    made = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 16, 16),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    add_adapter(made, config)
    return made


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return made_with(LierLaConfig(r=2))


def rates(groups: list[dict]) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in groups}


def test_no_public_name_is_a_modules_name() -> None:
    """Importing such a module would put it in the place of what is asked for."""
    import lora_adapters

    modules = {path.stem for path in Path(lora_adapters.__file__).parent.glob("*.py")}
    assert not modules & set(lora_adapters.__all__)
    import_module("lora_adapters.optimizer_groups")
    assert lora_adapters.param_groups is param_groups


def test_unet_lr_wins_over_lr(unet) -> None:
    assert rates(param_groups(unet, lr=1e-4)) == {"unet": 1e-4}
    assert rates(param_groups(unet, lr=1e-4, unet_lr=3e-4)) == {"unet": 3e-4}
    with pytest.raises(AdapterError, match="nothing to train"):
        param_groups(unet, lr=1e-4, unet_lr=0.0)


def test_blocks_have_groups_of_their_own(unet) -> None:
    found = rates(param_groups(unet, lr=1.0, block_lr_weights=block_lr_weights("sd", "2", "0", "0.5")))
    assert {name for name, rate in found.items() if rate == 2.0} == {f"unet_block{i}" for i in (1, 2, 4, 5, 7, 8)}
    assert found["unet_block16"] == 0.5
    assert "unet_block12" not in found


def test_loraplus_raises_the_rate_of_up_alone(unet) -> None:
    groups = param_groups(unet, lr=1.0, loraplus_lr_ratio=2.0, loraplus_unet_lr_ratio=16.0)
    assert rates(groups) == {"unet": 1.0, "unet plus": 16.0}
    ups = {id(p) for name, p in unet.named_parameters() if ".lora_B." in name}
    assert {id(p) for p in groups[1]["params"]} == ups or {id(p) for p in groups[0]["params"]} == ups


@pytest.mark.parametrize(
    "config", [LierLaConfig(r=2, use_dora=True), LoraConfig(use_dora=True, target_modules="all-linear")]
)
def test_every_parameter_of_a_dora_is_in_a_group(config) -> None:
    unet = made_with(config)
    groups = param_groups(unet, lr=1.0, loraplus_lr_ratio=16.0)
    trainable = {id(one) for one in unet.parameters() if one.requires_grad}
    listed = [id(one) for group in groups for one in group["params"]]
    assert len(listed) == len(trainable)
    assert set(listed) == trainable
    magnitudes = {id(one) for name, one in unet.named_parameters() if ".lora_magnitude_vector." in name}
    plain = next(group for group in groups if group["name"] == "unet")
    assert magnitudes
    assert magnitudes <= {id(one) for one in plain["params"]}


def test_modules_outside_of_the_blocks_stay_in_the_unets_own_group() -> None:
    unet = made_with(LoraConfig(r=2, target_modules=["conv_in", "time_embedding.linear_1", "to_q"]))
    groups = param_groups(unet, lr=3.0, block_lr_weights=[0.5] * 25)
    own = next(group for group in groups if group["name"] == "unet")
    assert own["lr"] == 3.0
    outside = {
        id(one)
        for name, one in unet.named_parameters()
        if name.startswith(("conv_in.lora", "time_embedding.linear_1.lora"))
    }
    assert {id(one) for one in own["params"]} == outside
    assert {rate for name, rate in rates(groups).items() if name != "unet"} == {1.5}


@pytest.mark.parametrize("wrap", [torch.compile, lambda model: model], ids=["compiled", "as it is"])
def test_wrapped_models_have_the_same_blocks(wrap, unet) -> None:
    weights = block_lr_weights("sd", "2", "0", "0.5")
    inner = made_with(LoraConfig(target_modules=["to_q"]))
    inner.delete_adapters("default")
    wrapped = wrap(get_peft_model(inner, LierLaConfig(r=2)))
    assert rates(param_groups(wrapped, lr=1.0, block_lr_weights=weights)) == rates(
        param_groups(unet, lr=1.0, block_lr_weights=weights)
    )


def test_the_group_of_a_transformer_has_its_components_name() -> None:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=4, num_attention_heads=2, in_channels=4,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 0),
    )  # fmt: skip
    add_adapter(model, LierLaConfig(r=2))
    assert rates(param_groups(model, lr=1e-4)) == {"transformer": 1e-4}
    count = by_class(model).blocks.count
    groups = rates(param_groups(model, lr=1.0, block_lr_weights=[0.5, *[1.0] * (count - 1)]))
    assert groups["transformer_block0"] == 0.5
    with pytest.raises(AdapterError, match=rf"has 25 values, the denoiser of .* has {count} blocks"):
        param_groups(model, lr=1.0, block_lr_weights=[1.0] * 25)
