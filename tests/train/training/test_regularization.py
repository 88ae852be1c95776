import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from lora_adapters import LycorisConfig
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.regularization import (
    add_dropouts,
    drop_all,
    drop_rows,
    limit_norms,
    module_dropout,
    norms,
    rank_dropout,
)
from lora_adapters.train.training.setup import prepare


@pytest.fixture
def layer() -> LoraLayer:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=["0"]), model)
    torch.nn.init.normal_(model[0].lora_B["default"].weight)
    return model[0]


def delta(layer: LoraLayer, x: torch.Tensor) -> torch.Tensor:
    return layer(x) - layer.base_layer(x)


def test_norms_are_those_of_the_whole_change(layer) -> None:
    expected = layer.get_delta_weight("default").norm()
    torch.testing.assert_close(norms([layer], "default")[0], expected)


def test_limit_scales_both_factors_evenly(layer) -> None:
    norm = norms([layer], "default").item()
    down = layer.lora_A["default"].weight.clone()
    assert limit_norms([layer], "default", norm / 4) == 1
    assert norms([layer], "default").item() == pytest.approx(norm / 4)
    torch.testing.assert_close(layer.lora_A["default"].weight, down / 2)
    assert limit_norms([layer], "default", norm) == 0


def test_rank_dropout_takes_whole_components_of_a_sample() -> None:
    torch.manual_seed(0)
    linear = rank_dropout(torch.ones(50, 7, 8), 0.25)
    assert torch.equal(linear, linear[:, :1].expand_as(linear))  # the same for all tokens
    assert linear.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    conv = rank_dropout(torch.ones(50, 8, 3, 3), 0.25)
    assert torch.equal(conv, conv[:, :, :1, :1].expand_as(conv))
    assert abs(conv.mean() - 1) < 0.15


def test_module_dropout_is_all_or_nothing() -> None:
    torch.manual_seed(0)
    kept = [module_dropout(torch.ones(3), 0.3) for _ in range(200)]
    assert {tuple(one.tolist()) for one in kept} == {(0.0,) * 3, (1.0,) * 3}
    assert abs(sum(one[0].item() for one in kept) / 200 - 0.7) < 0.1


@pytest.mark.parametrize("kind", ["network", "rank", "module"])
def test_dropouts_act_in_training_only(layer, kind) -> None:
    x = torch.randn(64, 6)
    plain = delta(layer, x)
    rates = {"network": None, "rank": None, "module": None, kind: 0.5}
    add_dropouts([layer], "default", **rates)
    torch.testing.assert_close(delta(layer.eval(), x), plain)
    layer.train()
    differs = [not torch.allclose(delta(layer, x), plain) for _ in range(10)]
    assert any(differs)


def test_rates_must_be_shares(layer) -> None:
    with pytest.raises(TrainingError, match="rank_dropout must be at least 0 and below 1"):
        add_dropouts([layer], "default", None, 1.0, None)


def test_norms_of_layers_of_several_shapes_in_their_order() -> None:
    torch.manual_seed(0)
    made = []
    for inputs, outputs, alpha in ((6, 5, 2), (4, 5, 2), (6, 5, 2), (6, 5, 4)):
        model = inject_adapter_in_model(
            LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"]),
            torch.nn.Sequential(torch.nn.Linear(inputs, outputs)),
        )
        layer = model[0]
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        made.append(layer)
    expected = torch.stack([layer.get_delta_weight("default").norm() for layer in made])
    torch.testing.assert_close(norms(made, "default"), expected)
    limit = expected.sort().values[1:3].mean()
    assert limit_norms(made, "default", float(limit)) == 2
    torch.testing.assert_close(norms(made, "default"), expected.clamp(max=limit))


def test_dropouts_of_changes_that_are_no_pairs() -> None:
    """Rank dropout takes whole output channels, with their biases, and makes up for it; module dropout all or none."""
    torch.manual_seed(0)
    weight, bias = drop_rows((torch.ones(1000, 3, 2), torch.ones(1000)), 0.25)
    assert torch.equal(weight[:, 0, 0], bias)
    assert torch.equal(weight, weight[:, :1, :1].expand_as(weight))
    assert bias.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert abs(float(bias.mean()) - 1) < 0.1
    assert drop_rows((None, torch.ones(4)), 0.0)[0] is None
    kept = [float(drop_all((torch.ones(2), None), 0.3)[0].mean()) for _ in range(300)]
    assert set(kept) == {0.0, 1.0}
    assert abs(sum(kept) / 300 - 0.7) < 0.1


@pytest.mark.parametrize("kind", ["rank", "module"])
def test_dropouts_of_other_kinds_act_in_training_only(kind) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    inject_adapter_in_model(LycorisConfig(r=3, algo="loha", target_modules=["0"]), model)
    for parameter in model[0].lora_A["default"].parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(8, 6)
    plain = delta(model[0], x)
    add_dropouts([model[0]], "default", **{"network": None, "rank": None, "module": None, kind: 0.5})
    torch.testing.assert_close(delta(model[0].eval(), x), plain)
    model.train()
    assert any(not torch.allclose(delta(model[0], x), plain) for _ in range(10))


def test_dropout_in_network_args_is_the_network_dropout(basics) -> None:
    """As kohya's trainer passes it on to LyCORIS; it wins over --network_dropout."""
    for args, hooks in (({}, 0), ({"dropout": "0.5"}, 1)):
        run = prepare(settings(**{**basics, "network_args": args}))
        assert {len(one.lora_A["default"]._forward_hooks) for one in run.layers} == {hooks}
    run = prepare(settings(**{**basics, "network_args": {"dropout": "0"}, "network_dropout": 0.5}))
    assert {len(one.lora_A["default"]._forward_hooks) for one in run.layers} == {0}
