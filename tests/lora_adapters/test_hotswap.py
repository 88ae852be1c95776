"""Hot-swapping, in U-Net and text encoder, and what a compiled model makes of it."""

import pytest
import torch
from torch import nn

from lora_adapters import (
    Adapter,
    AdapterError,
    C3LierConfig,
    DyLoraConfig,
    LierLaConfig,
    LowRank,
    add_adapter,
    set_rank,
)
from lora_adapters.convert.formats.metadata import DyLora
from lora_adapters.types.dylora.rank_controller import controllers

from .conftest import GOLDEN, expected
from .golden_outputs import error, outputs


def made(name="c3lier", rank=2, alpha=1.0, seed=0, unet_only=False):
    """Random pairs of one rank on the modules of a golden adapter."""
    torch.manual_seed(seed)
    modules = Adapter.load(GOLDEN / "sd15" / f"{name}.safetensors").modules
    return Adapter(
        {
            module: LowRank(
                torch.randn(rank, *one.down.shape[1:]) * 0.2, torch.randn(one.up.shape[0], rank) * 0.2, alpha + n % 3
            )
            for n, (module, one) in enumerate(modules.items())
            if not unet_only or module.component == "unet"
        }
    )


def alone(pipeline, adapter, weight=1.0, rank=None):
    """What a pipeline puts out into which the adapter has been loaded the ordinary way."""
    pipe = pipeline()
    adapter.to_pipeline(pipe, "x")
    pipe.set_adapters(["x"], [weight])
    if rank is not None:
        set_rank(pipe, rank)
    return outputs(pipe, expected("sd15"))


def same(pipe, wanted):
    base = {part: value + 1 for part, value in wanted.items()}
    return error(outputs(pipe, expected("sd15")), wanted, base) < 1e-5


@pytest.mark.parametrize("target", [None, 6], ids=["as it comes", "prepared"])
def test_swapped_it_is_the_other_and_nothing_else_changes(target, pipeline) -> None:
    pipe, other = pipeline(), made(seed=9)
    if target is not None:
        pipe.enable_lora_hotswap(target_rank=target)
    made().to_pipeline(pipe, "a")
    other.to_pipeline(pipe, "lora_a")  # a name that has the first one's in it
    for adapter in (made(rank=6, alpha=2, seed=1), made(rank=3, seed=2, unet_only=True), made("lierla", 4, seed=3)):
        pipe.load_lora_weights(adapter, adapter_name="a", hotswap=True)
        pipe.set_adapters(["a"])
        assert same(pipe, alone(pipeline, adapter))
    pipe.set_adapters(["a"], [0.5])
    assert same(pipe, alone(pipeline, adapter, 0.5))
    pipe.set_adapters(["lora_a"])
    assert same(pipe, alone(pipeline, other))
    taken = Adapter.from_pipeline(pipe, "a")
    for module, one in made("lierla", 4, seed=3).modules.items():
        torch.testing.assert_close(taken.modules[module].delta(), one.delta())
        assert (taken.modules[module].rank, taken.modules[module].alpha) == (one.rank, one.alpha)


def test_the_weight_that_was_set_stays(pipeline) -> None:
    pipe, after = pipeline(), made(rank=3, alpha=2, seed=1)
    made().to_pipeline(pipe, "a")
    pipe.set_adapters(["a"], [0.3])
    pipe.load_lora_weights(after, adapter_name="a", hotswap=True)
    assert same(pipe, alone(pipeline, after, 0.3))


def test_dylora_in_and_out(pipeline) -> None:
    pipe = pipeline()
    pipe.enable_lora_hotswap(target_rank=8)
    made().to_pipeline(pipe, "a")
    dylora = made(rank=4, seed=1).as_dylora(DyLora(2, "rank"))
    larger = made(rank=8, seed=2).as_dylora(DyLora(4, "rank"))
    for adapter, ranks in ((dylora, (2, 4)), (larger, (4, 8))):
        pipe.load_lora_weights(adapter, adapter_name="a", hotswap=True)
        assert isinstance(pipe.unet.peft_config["a"], DyLoraConfig)
        assert same(pipe, alone(pipeline, adapter))
        set_rank(pipe, ranks[0])
        assert same(pipe, alone(pipeline, adapter, rank=ranks[0]))
        set_rank(pipe, ranks[1])
    with pytest.raises(AdapterError, match="4, 8"):
        set_rank(pipe, 2)
    made().to_pipeline(pipe, "b")
    pipe.load_lora_weights(made(seed=5), adapter_name="a", hotswap=True)
    assert not controllers(pipe)


def test_what_cannot_be_swapped_changes_nothing(pipeline) -> None:
    pipe = pipeline()
    pipe.enable_lora_hotswap(target_rank=4)
    made("lierla").to_pipeline(pipe, "a")
    was = outputs(pipe, expected("sd15"))
    for adapter, name, line in (
        (made("lierla"), "b", "the text_encoder has no adapter b to swap"),
        (made("c3lier"), "a", "conv is not adapted by a, so it cannot be swapped"),
        (
            made("lierla", 5),
            "a",
            r"has rank 5, but the loaded adapter has room for 4: call enable_lora_hotswap\(target_rank=5\)",
        ),
    ):
        with pytest.raises(AdapterError, match=line):
            pipe.load_lora_weights(adapter, adapter_name=name, hotswap=True)
        assert same(pipe, was)
    pipe.fuse_lora()
    with pytest.raises(AdapterError, match="unfuse it first"):
        pipe.load_lora_weights(made("lierla"), adapter_name="a", hotswap=True)
    other = pipeline()
    other.enable_lora_hotswap(target_rank=2)
    with pytest.raises(AdapterError, match="its rank 4 is above the target_rank=2 of enable_lora_hotswap"):
        made(rank=4).to_pipeline(other, "a")
    assert other.get_list_adapters() == {}


@pytest.mark.parametrize("extra", ["use_dora", "lora_bias"])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_what_is_more_than_pairs_is_not_swapped_in_part(component, extra, pipeline) -> None:
    pipe, after = pipeline(), made("lierla", unet_only=True)
    model = getattr(pipe, component)
    for part in (pipe.unet, pipe.text_encoder):
        add_adapter(part, LierLaConfig(r=2, **({extra: True} if part is model else {})), "a")
    was = outputs(pipe, expected("sd15"))
    with pytest.raises(AdapterError, match=rf"{component}\.\S+ has .* in a, which a swap would not replace"):
        pipe.load_lora_weights(after, adapter_name="a", hotswap=True)
    assert same(pipe, was)


# --- compiled ---------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Every kind of layer that is adapted."""

    def __init__(self):
        super().__init__()
        self.conv, self.point, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def forward(self, x):
        return self.linear(self.point(self.conv(x)).mean((2, 3)))


def without_recompiling():
    return torch._dynamo.config.patch(error_on_recompile=True)


def random_up(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_turns_with_the_dial(backend) -> None:
    from peft import inject_adapter_in_model

    torch.manual_seed(0)
    torch._dynamo.reset()
    config = DyLoraConfig(r=4, conv_dim=4, unit=1, rank_scaling="rank", target_modules=["conv", "point", "linear"])
    model = inject_adapter_in_model(config, Small()).eval()
    random_up(model)
    compiled, x = torch.compile(model, backend=backend), torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        compiled(x)
        with without_recompiling():
            seen = set()
            for rank in (1, 3, 4, 2):
                set_rank(compiled, rank)
                found = compiled(x)
                torch.testing.assert_close(found, model(x))
                seen.add(round(found.sum().item(), 4))
            assert len(seen) == 4


def test_training_is_not_compiled_anew_for_each_rank() -> None:
    from peft import inject_adapter_in_model

    torch._dynamo.reset()
    config = DyLoraConfig(r=8, unit=1, target_modules=["point", "linear"])
    model = inject_adapter_in_model(config, Small()).train()
    compiled, x = torch.compile(model, backend="eager"), torch.randn(2, 3, 5, 5)
    for _ in range(2):  # the first step finds the dial at rest
        compiled(x).sum().backward()
    with without_recompiling():
        drawn = set()
        for _ in range(12):
            compiled(x).sum().backward()
            drawn.update(controllers(model)[0].now)
    assert len(drawn) > 3


@pytest.mark.slow
@pytest.mark.parametrize("dylora", [False, True], ids=["plain", "dylora"])
def test_a_compiled_unet_takes_other_adapters_and_ranks(dylora, pipeline) -> None:
    torch._dynamo.reset()
    pipe, golden = pipeline(), expected("sd15")
    pipe.enable_lora_hotswap(target_rank=8)

    def adapter(rank, seed):
        found = made(rank=rank, seed=seed, unet_only=True)
        return found.as_dylora(DyLora(rank // 2)) if dylora else found

    adapter(4, 0).to_pipeline(pipe, "a")
    pipe.unet = torch.compile(pipe.unet, backend="aot_eager")
    outputs(pipe, golden)
    with without_recompiling():
        for rank, seed in ((8, 1), (2, 2), (6, 3)):
            pipe.load_lora_weights(adapter(rank, seed), adapter_name="a", hotswap=True)
            assert same(pipe, alone(pipeline, adapter(rank, seed)))
            if dylora:
                set_rank(pipe, rank // 2)
                assert same(pipe, alone(pipeline, adapter(rank, seed), rank=rank // 2))


def test_peft_users_swap_too(tmp_path) -> None:
    """PEFT's own hot-swapping of folders, prepared and compiled, with this package's configs."""
    from peft import get_peft_model
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    torch._dynamo.reset()
    x, wanted = torch.randn(2, 3, 5, 5), []
    base = Small().state_dict()
    for rank in (2, 6):
        model = Small()
        model.load_state_dict(base)
        config = C3LierConfig(r=rank, lora_alpha=3, conv_dim=rank, conv_alpha=3, target_modules=["conv", "linear"])
        peft_model = get_peft_model(model, config).eval()
        random_up(peft_model)
        peft_model.save_pretrained(tmp_path / str(rank))
        wanted.append(peft_model(x))
    model = Small()
    model.load_state_dict(base)
    from peft import PeftModel

    peft_model = PeftModel.from_pretrained(model, tmp_path / "2").eval()
    prepare_model_for_compiled_hotswap(peft_model, target_rank=6)
    compiled = torch.compile(peft_model, backend="eager")
    torch.testing.assert_close(compiled(x), wanted[0])
    with without_recompiling():
        hotswap_adapter(compiled, tmp_path / "6", adapter_name="default", torch_device="cpu")
        torch.testing.assert_close(compiled(x), wanted[1])


def test_names_are_those_of_the_model_also_where_it_is_compiled(pipeline, tmp_path) -> None:
    pipe = pipeline()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    adapter = made()
    adapter.to_pipeline(pipe, "a")
    taken = Adapter.from_pipeline(pipe, "a")
    assert taken.modules.keys() == adapter.modules.keys()
    taken.save(tmp_path / "a.safetensors")
