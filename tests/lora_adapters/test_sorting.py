"""Sorted components: the same adapter, of every rank; and what an optimizer keeps for them."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from lora_adapters import (
    Adapter,
    AdapterError,
    C3LierConfig,
    DyLoraConfig,
    LycorisConfig,
    add_adapter,
    set_rank,
    set_step,
    sort_components,
)
from lora_adapters.convert.formats.metadata import DyLora
from lora_adapters.optimizer_state import averages_weights
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.optimizers import (
    KINDS,
    create_optimizer,
    optimizer_class,
    start_training,
    weights_to_keep,
)
from lora_adapters.types.dylora.rank_controller import controllers
from lora_adapters.types.dylora.rank_sampling import ranks_of_step
from lora_adapters.types.layers import layers
from tests.lora_adapters.conftest import expected
from tests.lora_adapters.golden_outputs import error, outputs


def random_up(*models):
    torch.manual_seed(0)
    for model in models:
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.05)


def assert_same_changes(adapter, other, rtol=1e-4, atol=1e-6):
    assert adapter.modules.keys() == other.modules.keys()
    for name, pair in adapter.modules.items():
        torch.testing.assert_close(pair.delta(), other.modules[name].delta(), rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "config",
    [
        C3LierConfig(r=6, lora_alpha=3, conv_dim=4, conv_alpha=1),  # linear layers, 1x1 and 3x3 convolutions
        DyLoraConfig(r=8, lora_alpha=4, conv_dim=4, conv_alpha=2, unit=2),
        DyLoraConfig(r=8, lora_alpha=4, rank_scaling="constant"),
    ],
)
def test_a_sorted_pipeline_is_the_same_at_full_rank_and_svd_s_cut_at_every_other(config, pipeline, tmp_path):
    golden, pipe = expected("sd15"), pipeline()
    base = outputs(pipe, golden)
    for model in (pipe.unet, pipe.text_encoder):
        add_adapter(model, dataclasses.replace(config), "a")
        model.eval()
    random_up(pipe.unet, pipe.text_encoder)
    pipe.set_adapters(["a"], 0.7)
    before, unsorted = outputs(pipe, golden), Adapter.from_pipeline(pipe, "a")
    unsorted = unsorted.map(lambda pair: dataclasses.replace(pair, down=pair.down.clone(), up=pair.up.clone()))
    weights = {id(weight) for weight in pipe.unet.parameters()}

    sort_components(pipe)
    assert error(outputs(pipe, golden), before, base) < 1e-5
    assert {id(weight) for weight in pipe.unet.parameters()} == weights  # an optimizer still has them
    assert Adapter.from_pipeline(pipe, "a").dylora == DyLora(getattr(config, "unit", 1), "constant")
    set_rank(pipe, 4)
    other = pipeline()
    other.load_lora_weights(unsorted.svd(4).save(tmp_path / "4.safetensors"), adapter_name="b")
    other.set_adapters(["b"], 0.7)
    assert error(outputs(pipe, golden), outputs(other, golden), base) < 1e-4
    saved = Adapter.from_pipeline(pipe, "a").save(tmp_path / "sorted.safetensors")
    assert_same_changes(Adapter.load(saved).truncate(2), unsorted.svd(2))


def test_stabilized_padded_and_wrapped_adapters_are_sorted(pipeline):
    golden, pipe = expected("sd15"), pipeline()
    base = outputs(pipe, golden)
    pipe.enable_lora_hotswap(target_rank=8)
    source = pipeline()
    source.unet.add_adapter(DyLoraConfig(r=4, lora_alpha=2), "a")
    random_up(source.unet)
    Adapter.from_pipeline(source, "a").to_pipeline(pipe, "a")
    before = outputs(pipe, golden)
    sort_components(pipe, adapter_name="a")
    assert error(outputs(pipe, golden), before, base) < 1e-5
    assert next(layers(pipe.unet, "a"))[1].lora_A["a"].weight[4:].count_nonzero() == 0

    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=4, lora_alpha=2, target_modules=["0"], use_rslora=True)
    )
    random_up(model)
    model.eval()
    x = torch.randn(3, 6)
    was = model(x)
    sort_components(model)
    torch.testing.assert_close(model(x), was)
    set_rank(model, 4)
    torch.testing.assert_close(model(x), was)


def test_what_cannot_be_sorted_is_left_alone():
    def model(**options):
        made = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], **options), nn.Sequential(nn.Linear(4, 4)))
        random_up(made)
        return made

    with pytest.raises(AdapterError, match="no LoRA x was found"):
        sort_components(model(), adapter_name="x")
    with pytest.raises(AdapterError, match="0 has DoRA's magnitudes in default"):
        sort_components(model(use_dora=True))
    loha = nn.Sequential(nn.Linear(4, 4))
    loha = inject_adapter_in_model(LycorisConfig(r=2, algo="loha", target_modules=["0"]), loha)
    with pytest.raises(AdapterError, match="0 is not a LoRA in default"):
        sort_components(loha)
    fused = model()
    fused[0].merge()
    with pytest.raises(AdapterError, match="fused into the weights: unfuse it first"):
        sort_components(fused)


def test_all_loras_are_sorted_beside_another_kind():
    torch.manual_seed(0)
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(4, 4)), "plain")
    model = inject_adapter_in_model(LycorisConfig(r=2, algo="loha", target_modules=["0"]), model, "other")
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    others = {name: value.clone() for name, value in model.state_dict().items() if "plain" not in name}
    pair = model[0].lora_B["plain"].weight @ model[0].lora_A["plain"].weight
    sort_components(model)
    up, down = model[0].lora_B["plain"].weight, model[0].lora_A["plain"].weight
    torch.testing.assert_close(up @ down, pair)
    torch.testing.assert_close((up.T @ up)[0, 1], torch.zeros(()), atol=1e-5, rtol=0)
    for name, value in others.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)
    with pytest.raises(AdapterError, match="0 is not a LoRA in other"):
        sort_components(model, adapter_name="other")


def test_an_untrained_adapter_can_still_learn_after_sorting():
    model = inject_adapter_in_model(LoraConfig(r=3, target_modules=["0"]), nn.Sequential(nn.Linear(4, 4)))
    down = model[0].lora_A["default"].weight.detach().clone()
    sort_components(model)
    torch.testing.assert_close(model[0].lora_A["default"].weight, down, rtol=0, atol=0)
    random_up(model)
    model[0].lora_B["default"].weight.data[:, 1:] = 0  # one component of three
    sort_components(model)
    assert model[0].lora_A["default"].weight.count_nonzero(1).min() > 0


# --- own loops -------------------------------------------------------------------------------------------------------


def trained_linear(sort_at, sort=True, steps=10, **options):
    """A linear layer in a loop of its own; the ranks of each step."""
    config = DyLoraConfig(r=4, lora_alpha=4, target_modules=["0"], sort_at=sort_at, **options)
    torch.manual_seed(0)
    model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(6, 5))).train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.01)
    ranks = []
    for step in range(steps):
        if set_step(model, step, total_steps=steps) and sort:
            sort_components(model, optimizer)
        model(torch.randn(8, 6)).square().mean().backward()
        ranks.append(list(controllers(model)[0].now))
        optimizer.step()
        optimizer.zero_grad()
    return model, ranks


def test_ranks_are_drawn_from_the_sorting_step_on():
    _, ranks = trained_linear(0.3)
    assert ranks[:3] == [[4]] * 3
    assert all(len(drawn) == 8 and set(drawn) > {1} for drawn in ranks[3:])
    assert ranks[3:] == [
        ranks_of_step((1, 2, 3, 4), "spread", 0, step, range(8), 8, sorted_components=True)
        for step in range(3, len(ranks))
    ]


def test_freeze_lower_begins_at_the_sorting_step():
    config = DyLoraConfig(r=4, lora_alpha=4, target_modules=["0"], sort_at=0.5, freeze_lower=True)
    model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(6, 5))).train()
    random_up(model)
    for step in range(4):
        if set_step(model, step, total_steps=4):
            sort_components(model)
        model(torch.randn(8, 6)).square().mean().backward()
        down = model[0].lora_A["default"].weight
        trained = int(down.grad.abs().sum(1).count_nonzero())
        assert trained == (4 if step < 2 else 1)
        down.grad = None


def test_a_forgotten_length_or_sorting_is_said():
    with pytest.raises(AdapterError, match="sorted before step 3: call sort_components"):
        trained_linear(0.3, sort=False)
    model, _ = trained_linear(0.3)
    controllers(model)[0].nested_from = None
    with pytest.raises(AdapterError, match=r"sort_at=0.3, a share .*total_steps"):
        model(torch.randn(8, 6))
    with pytest.raises(AdapterError, match=r"sort_at is 1\.0: it must be a share"):
        DyLoraConfig(sort_at=1.0)
    with pytest.raises(AdapterError, match=r"sort_at needs rank_scaling constant.*not sqrt"):
        DyLoraConfig(sort_at=0.3, rank_scaling="sqrt")
    assert (DyLoraConfig(sort_at=0.3).rank_scaling, DyLoraConfig().rank_scaling) == ("constant", "sqrt")


def test_what_is_saved_before_the_sorting_step_is_sorted(pipeline):
    golden, pipe = expected("sd15"), pipeline()
    pipe.unet.add_adapter(DyLoraConfig(r=8, lora_alpha=4, sort_at=0.5), "a")
    random_up(pipe.unet)
    pipe.unet.train()
    plain = Adapter.from_pipeline(pipe, "a")
    set_step(pipe, 0, total_steps=2)
    pipe.unet(golden["latents"], 7, golden["context"])
    early = Adapter.from_pipeline(pipe, "a")
    assert_same_changes(early.truncate(2), plain.svd(2))
    sort_components(pipe)
    for name, pair in Adapter.from_pipeline(pipe, "a").modules.items():
        torch.testing.assert_close(pair.up, early.modules[name].up)


# --- optimizers ------------------------------------------------------------------------------------------------------

RATES = {"sgdnesterov": 1.0, "sgdnesterov8bit": 1.0, "sgdschedulefree": 1.0, "prodigy": 1.0, "dadaptation": 1.0}


def descent(name, sort=True):
    """The loss of a linear problem before the sorting step, after it, and at the end; and what is learned."""
    torch.manual_seed(0)
    target = torch.randn(80, 64) @ torch.randn(64, 64) / 40  # above 4,096 numbers, which bitsandbytes keeps in 8 bits
    config = LoraConfig(r=64, lora_alpha=64, target_modules=["0"])
    model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(64, 80, bias=False)))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    model[0].base_layer.weight.data.zero_()
    random_up(model)
    rate = RATES.get(name, 2e-3)
    options = settings(optimizer_type=name, learning_rate=rate)
    group = {"params": weights, "lr": options.learning_rate, "name": "unet"}
    optimizer = create_optimizer(options, [group])
    start_training(optimizer)
    found = []
    for step in range(40):
        if step == 20:
            with weights_to_keep(optimizer):
                found.append((model[0](torch.eye(64)).T - target).square().mean().item())
            if sort:
                sort_components(model, optimizer)
            with weights_to_keep(optimizer):
                found.append((model[0](torch.eye(64)).T - target).square().mean().item())
        optimizer.zero_grad()
        (model[0](torch.eye(64)).T - target).square().mean().backward()
        optimizer.step()
    with weights_to_keep(optimizer):
        found.append((model[0](torch.eye(64)).T - target).square().mean().item())
        return *found, model[0](torch.eye(64)).T.detach()


@pytest.mark.parametrize("name", sorted(KINDS))
def test_an_optimizer_goes_on_as_if_nothing_had_been_sorted(name):
    if KINDS[name].package:
        pytest.importorskip(KINDS[name].package.replace("-", "_"))
    before, sorted_, after, change = descent(name)
    assert sorted_ == pytest.approx(before, rel=1e-4)
    if averages_weights(optimizer_class(name)[0]):  # it restarts
        assert after < before
        return
    start, _, unsorted, expected_change = descent(name, sort=False)
    assert before == start
    assert after == pytest.approx(unsorted, rel=1e-3)
    torch.testing.assert_close(
        change, expected_change, rtol=1e-3, atol=1e-3 if "8bit" in name or "dadapt" in name else 3e-5
    )
