"""A DyLoRA beside PEFT's own features: never replaced silently, never something else than its config says."""

import copy
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear
from torch import nn

from lora_adapters import AdapterError, C3LierConfig, DyLoraConfig, LierLaConfig, LycorisConfig, add_adapter, set_rank
from lora_adapters.convert.formats.metadata import DyLora
from lora_adapters.types.dylora import rank_controller as dylora_module

from .peft_models import MODELS, TARGETS, config, fill

# Every option by which the installed PEFT computes a layer in another way; a new release's are among them.
VARIANTS = [one.name for one in fields(LoraConfig) if one.metadata.get("is_lora_variant")]


def values(name):
    """A value that turns the variant on."""
    if name == "alora_invocation_tokens":
        return [1, 2]
    if not name.endswith("_config") and name != "use_bdlora":
        return True
    import peft

    kind = {"arrow": "ArrowConfig", "kasa": "KasaConfig", "velora": "VeloraConfig", "monteclora": "MontecloraConfig"}
    cls = getattr(peft, kind.get(name.removesuffix("_config"), "BdLoraConfig"), None)
    cls = cls or getattr(peft.tuners.lora.config, kind.get(name.removesuffix("_config"), "BdLoraConfig"))
    return cls()


@pytest.mark.skipif(not VARIANTS, reason="this PEFT does not mark the options of its variants")
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_pefts_is_refused(name) -> None:
    with pytest.raises(AdapterError, match=name):
        DyLoraConfig(target_modules=TARGETS, **{name: values(name)})
    model, call = MODELS["custom"]()
    before, wanted = copy.deepcopy(model.state_dict()), call(model)
    late = DyLoraConfig(target_modules=TARGETS)
    setattr(late, name, values(name))  # set after the config has been checked
    with pytest.raises(AdapterError, match=name):
        inject_adapter_in_model(late, model)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    torch.testing.assert_close(call(model), wanted, rtol=0, atol=0)


def test_a_variant_by_initialisation_is_refused() -> None:
    init = next(one for one in fields(LoraConfig) if one.name == "init_lora_weights")
    for value in init.metadata.get("lora_variants", ()):
        with pytest.raises(AdapterError, match=f"init_lora_weights='{value}'"):
            DyLoraConfig(target_modules=TARGETS, init_lora_weights=value)


def test_a_layer_that_has_a_variant_keeps_it() -> None:
    model, call = MODELS["custom"]()
    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["body.0"], use_dora=True), fill(model))
    wanted, had = call(model), model.body[0].lora_variant["default"]
    with pytest.raises(AdapterError, match=rf"body\.0 has PEFT's {type(had).__name__} in adapter default"):
        dylora_module.attach(model, "default", DyLora())
    assert model.body[0].lora_variant["default"] is had
    assert not model._forward_pre_hooks
    torch.testing.assert_close(call(model), wanted, rtol=0, atol=0)


def test_a_layer_that_knows_no_variants_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(Linear, "forward", lambda self, x: self.base_layer(x))  # as the layers of AWQ, EETQ and others
    model = nn.Sequential(nn.Linear(3, 5))
    with pytest.raises(
        AdapterError, match=r"0 is a peft\.tuners\.lora\.layer\.Linear, a layer that computes plain LoRA only"
    ):
        inject_adapter_in_model(DyLoraConfig(target_modules=["0"]), model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("kind", [LierLaConfig, C3LierConfig, DyLoraConfig])
def test_parameters_are_refused_before_anything_is_changed(kind) -> None:
    with pytest.raises(AdapterError, match=f"target_parameters: {kind.__name__} is for linear layers and conv"):
        kind(target_modules=TARGETS, target_parameters=["head.weight"])
    model, late = MODELS["custom"]()[0], kind(target_modules=TARGETS)
    late.target_parameters = ["head.weight"]
    with pytest.raises(AdapterError, match="target_parameters"):
        inject_adapter_in_model(late, model)
    assert not any(hasattr(one, "lora_A") for one in model.modules())


@pytest.mark.parametrize("kind", [LierLaConfig, DyLoraConfig])
def test_a_convolution_at_r_has_lora_alpha_too(kind) -> None:
    def of(**options):
        model = get_peft_model(MODELS["custom"]()[0], kind(target_modules=TARGETS, r=8, lora_alpha=8, **options))
        layer = model.base_model.model.conv
        return layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"]

    assert of() == (8, 8, 1.0)
    assert of(conv_alpha=4) == (8, 4, 0.5)
    assert of(conv_dim=4) == (4, 1, 0.25)  # kohya's default of conv_alpha
    assert of(conv_dim=4, conv_alpha=2) == (4, 2, 0.5)


def test_plain_lora_is_pefts_own_in_name_and_type() -> None:
    model = get_peft_model(MODELS["custom"]()[0], LoraConfig(target_modules=TARGETS))
    assert type(model.base_model) is LoraModel
    assert LoraModel.__module__ == "peft.tuners.lora.model"
    assert model.get_model_status().adapter_model_type == "LoraModel"


def test_a_pickled_plain_lora_opens_without_this_package(tmp_path) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(3, 5)), LoraConfig(r=2, target_modules=["0"]))
    torch.save(model, tmp_path / "model.pt")
    code = "import sys, torch; torch.load(sys.argv[1], weights_only=False); print('lora_adapters' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("kind", [LierLaConfig, C3LierConfig, DyLoraConfig, LycorisConfig])
def test_a_whole_model_is_saved_and_opened(kind, tmp_path) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(3, 5)), kind(r=2, target_modules=["0"])).eval()
    fill(model)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.testing.assert_close(again(torch.ones(1, 3)), model(torch.ones(1, 3)), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [LierLaConfig, C3LierConfig, DyLoraConfig])
def test_the_model_keeps_the_config_that_it_is_given(kind) -> None:
    mine = kind(r=8, target_modules=TARGETS)
    model = get_peft_model(MODELS["custom"]()[0], mine)
    assert model.peft_config["default"] is mine
    other = kind(r=4, target_modules=TARGETS)
    model.add_adapter("other", other)
    assert model.peft_config["other"] is other


def test_one_config_for_two_models() -> None:
    mine = LierLaConfig(r=8, lora_alpha=4)
    unet, text_encoder = MODELS["unet"]()[0], MODELS["clip"]()[0]
    unet.add_adapter(mine, "a")
    add_adapter(text_encoder, mine, "a")
    assert unet.peft_config["a"] is mine
    there = text_encoder.peft_config["a"]
    assert (there.r, there.lora_alpha) == (8, 4)
    assert there.target_modules
    assert not there.target_modules & mine.target_modules
    mine.r = 2  # what is set by hand afterwards counts
    again = MODELS["unet"]()[0]
    add_adapter(again, mine, "b")
    assert {layer.r["b"] for _, layer in dylora_module.layers(again, "b")} == {2}


def test_add_adapter_leaves_a_model_as_its_own_method_does() -> None:
    """It is for text encoders, whose own asks for PEFT 0.22 since transformers 5.24; a U-Net's is the reference."""
    ours, theirs = MODELS["unet"]()[0], MODELS["unet"]()[0]
    for name in ("a", "b"):
        torch.manual_seed(0)
        add_adapter(ours, LierLaConfig(r=2), name)
        torch.manual_seed(0)
        theirs.add_adapter(LierLaConfig(r=2), name)
        assert ours.active_adapters() == theirs.active_adapters() == [name]
    assert ours._hf_peft_config_loaded
    wanted = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        assert torch.equal(parameter, wanted[key]), key
        assert parameter.requires_grad == wanted[key].requires_grad, key
    with pytest.raises(AdapterError, match="already has an adapter a"):
        add_adapter(ours, LierLaConfig(r=2), "a")


def test_a_config_that_a_model_could_not_take_is_as_it_was() -> None:
    mine = DyLoraConfig(r=2, target_modules=["0", "1"])
    before = copy.deepcopy(mine)
    with pytest.raises(AdapterError, match="0 is Embedding"):
        get_peft_model(nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8)), mine)
    assert mine == before
    assert get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), mine).peft_config["default"] is mine


SWAPPED = {
    "plain": lambda: LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS),
    "rslora": lambda: LierLaConfig(r=4, lora_alpha=2, target_modules=TARGETS, use_rslora=True),
    "lierla": lambda: LierLaConfig(r=2, lora_alpha=1, target_modules=TARGETS),
    "dylora": lambda: DyLoraConfig(r=8, lora_alpha=4, unit=2, target_modules=TARGETS, rank_scaling="rank"),
    "other dylora": lambda: DyLoraConfig(r=4, lora_alpha=1, unit=1, target_modules=TARGETS),
}
PAIRS = [
    ("plain", "dylora"),
    ("dylora", "plain"),
    ("dylora", "other dylora"),
    ("other dylora", "dylora"),
    ("lierla", "dylora"),
    ("dylora", "lierla"),
    ("lierla", "plain"),
    ("rslora", "rslora"),
]


@pytest.mark.parametrize("prepared", [False, True], ids=["as it comes", "prepared"])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pefts_own_swap(pair, prepared, tmp_path) -> None:
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    def made(name, seed, model):
        return fill(get_peft_model(model, SWAPPED[name]()), seed=seed).eval()

    base, call = MODELS["custom"]()
    here, there = made(pair[0], 1, copy.deepcopy(base)), made(pair[1], 2, copy.deepcopy(base))
    there.save_pretrained(tmp_path / "there")
    with torch.no_grad():
        before = call(here)
        if prepared:
            prepare_model_for_compiled_hotswap(here, target_rank=8, config=here.peft_config)
            torch.testing.assert_close(call(here), before)
        hotswap_adapter(here, tmp_path / "there", "default", torch_device="cpu")
        torch.testing.assert_close(call(here), call(there))
        assert isinstance(here.peft_config["default"], DyLoraConfig) == ("dylora" in pair[1])
        here.save_pretrained(tmp_path / "again")
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").eval()
        torch.testing.assert_close(call(again), call(there))
        here.set_adapter("default")
        if "dylora" in pair[1]:
            for model in (here, there, again):
                set_rank(model, 4)
            torch.testing.assert_close(call(here), call(there))
            torch.testing.assert_close(call(again), call(there))
            wrong = 3 if pair[1] == "dylora" else 5
            with pytest.raises(AdapterError, match=f"rank {wrong} is not one of"):
                set_rank(here, wrong)
        else:
            with pytest.raises(AdapterError, match="no DyLoRA"):
                set_rank(here, 2)


def test_a_dial_turns_after_preparing() -> None:
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    model, call = MODELS["custom"]()
    model = fill(get_peft_model(model, config("dylora", "custom", conv_dim=4))).eval()
    set_rank(model, 2)
    wanted = call(model)
    prepare_model_for_compiled_hotswap(model, target_rank=6, config=model.peft_config)
    assert model.peft_config["default"].r == 4  # padding is no rank
    torch.testing.assert_close(call(model), wanted)
    set_rank(model, 4)
    assert (call(model) - wanted).abs().max() > 1e-5


def test_layers_padded_behind_the_dials_back() -> None:
    from peft.utils import hotswap

    model, call = MODELS["custom"]()
    model = fill(get_peft_model(model, config("dylora", "custom", conv_dim=4))).eval()
    set_rank(model, 2)
    wanted = call(model)
    hotswap.prepare_model_for_compiled_hotswap.stock(model, target_rank=6)  # as imported before this package was
    torch.testing.assert_close(call(model), wanted)
    combined = get_peft_model(MODELS["custom"]()[0], config("dylora", "custom", conv_dim=4)).eval()
    fill(combined)
    set_rank(combined, 2)
    hotswap.prepare_model_for_compiled_hotswap.stock(combined, target_rank=6)
    combined.add_weighted_adapter(["default"], [1.0], "one", "svd")  # which asks for the width before any call
    combined.set_adapter("one")
    torch.testing.assert_close(call(combined), wanted, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_swapped_leaves_all_as_it_was(tmp_path) -> None:
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    base, call = MODELS["custom"]()
    model = fill(get_peft_model(copy.deepcopy(base), SWAPPED["dylora"]())).eval()
    more = LoraConfig(r=8, lora_alpha=4, target_modules=[*TARGETS, "head"])
    fill(get_peft_model(copy.deepcopy(base), more)).save_pretrained(tmp_path / "more")
    biased = LoraConfig(r=8, lora_alpha=4, target_modules=["body.0"], lora_bias=True)
    fill(get_peft_model(copy.deepcopy(base), biased)).save_pretrained(tmp_path / "biased")
    wanted, was = call(model), copy.deepcopy(model.peft_config["default"])
    with pytest.raises(AdapterError, match="rank 8: use a target_rank of 8"):
        prepare_model_for_compiled_hotswap(model, target_rank=4)
    for folder, line in (
        ("more", "model.head is not adapted by default"),
        ("biased", "lora_B.default.bias is not half"),
    ):
        with pytest.raises(AdapterError, match=line):
            hotswap_adapter(model, tmp_path / folder, "default", torch_device="cpu")
    torch.testing.assert_close(call(model), wanted, rtol=0, atol=0)
    assert model.peft_config["default"] == was
    set_rank(model, 4)
