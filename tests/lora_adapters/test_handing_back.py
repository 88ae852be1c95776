"""What this package does not read: loaded by diffusers whole, or one line and nothing changed."""

import json
import logging
import math

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from lora_adapters import Adapter, AdapterError, injection
from lora_adapters.convert.formats import registry
from lora_adapters.model_state import ModelState

from .conftest import GOLDEN

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"
QUERY, KEY = f"{ATTENTION}.to_q", f"{ATTENTION}.to_k"
FIRST = GOLDEN / "sd15" / "lierla.safetensors"


@pytest.fixture(autouse=True)
def dora_is_not_read(monkeypatch):
    """DoRA stands for whatever diffusers reads and this package does not: its format is taken away here."""
    monkeypatch.setattr(registry, "FORMATS", tuple(known for known in registry.FORMATS if known.NAME != "lycoris"))


def models(pipe):
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


def snapshot(pipe):
    states = {name: model.state_dict() for name, model in models(pipe).items()}
    return {f"{name}.{key}": one.clone() for name, state in states.items() for key, one in state.items()}


def unchanged(pipe, before, adapters):
    after = snapshot(pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert pipe.get_list_adapters() == adapters
    for model in models(pipe).values():
        assert bool(adapters) == any(isinstance(part, LoraLayer) for part in model.modules())
        assert bool(getattr(model, "_hf_peft_config_loaded", False)) == bool(adapters)
        assert set(getattr(model, "peft_config", {})) == {name for names in adapters.values() for name in names}


def dora(pipe, file, rank=2, alpha=2.0):
    """A DoRA of two layers as diffusers saves it, with random weights; and what it makes of their weights."""
    unet = diffusers.UNet2DConditionModel.from_config(pipe.unet.config)
    unet.load_state_dict({key: one for key, one in pipe.unet.state_dict().items() if "lora_" not in key}, strict=False)
    facts = {"r": rank, "lora_alpha": alpha, "target_modules": [QUERY, KEY], "init_lora_weights": False}
    config = LoraConfig(**facts, use_dora=True)
    unet.add_adapter(config, "new")
    torch.manual_seed(3)
    for path in (QUERY, KEY):
        magnitude = unet.get_submodule(path).lora_magnitude_vector["new"].weight
        magnitude.data.mul_(1 + torch.rand_like(magnitude))
    tensors = {f"unet.{key}": one.clone() for key, one in get_peft_model_state_dict(unet, adapter_name="new").items()}
    save_file(tensors, file)
    return tensors


def changed_weight(base, tensors, path, alpha):
    """DoRA's own definition (arXiv:2402.09353, equation 5): the column norm is the magnitude."""
    down, up = tensors[f"unet.{path}.lora_A.weight"], tensors[f"unet.{path}.lora_B.weight"]
    direction = base + alpha / len(down) * up @ down
    magnitude = tensors[f"unet.{path}.lora_magnitude_vector"].flatten()
    return magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("there", [False, True], ids=["alone", "beside another"])
@pytest.mark.parametrize("given", ["file", "dict"])
def test_a_dora_is_what_its_definition_says(given, there, pipeline, tmp_path) -> None:
    pipe = pipeline()
    base = pipe.unet.get_submodule(QUERY).weight.clone()
    tensors = dora(pipe, tmp_path / "dora.safetensors", alpha=2.0)
    if there:
        pipe.load_lora_weights(FIRST, adapter_name="first")
    pipe.load_lora_weights(tmp_path / "dora.safetensors" if given == "file" else tensors, adapter_name="dora")
    pipe.set_adapters(["dora"])
    layer = pipe.unet.get_submodule(QUERY)
    layer.merge()
    torch.testing.assert_close(layer.get_base_layer().weight, changed_weight(base, tensors, QUERY, 2.0))
    layer.unmerge()
    assert pipe.get_list_adapters()["unet"] == ["first", "dora"] if there else ["dora"]


def strange_dora(kind, pipe, tensors):
    """A DoRA that diffusers takes and leaves something of out."""
    if kind == "a module that is not there":
        return tensors | {key.replace("to_k", "to_z"): one.clone() for key, one in tensors.items() if "to_k" in key}
    if kind == "a magnitude that is missing":
        del tensors[f"unet.{KEY}.lora_magnitude_vector"]
    elif kind == "a half that is missing":
        del tensors[f"unet.{KEY}.lora_B.weight"]
    elif kind == "a shape that differs":
        tensors[f"unet.{KEY}.lora_B.weight"] = torch.ones(5, 2)
    elif kind == "an unknown key":
        tensors[f"unet.{KEY}.lora_colour"] = torch.ones(2)
    elif kind == "a text encoder that fails":
        text = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
        tensors |= {f"{text}.lora_A.weight": torch.ones(2, 3), f"{text}.lora_B.weight": torch.ones(3, 2)}
    elif kind == "kohya's magnitudes":
        return {key.replace("lora_magnitude_vector", "dora_scale"): one for key, one in tensors.items()}
    return tensors


STRANGE = (
    "a module that is not there",
    "a magnitude that is missing",
    "a half that is missing",
    "a shape that differs",
    "an unknown key",
    "a text encoder that fails",
    "kohya's magnitudes",
)


@torch.no_grad()
def test_biases_beside_layers_without_one_are_pefts(pipeline, tmp_path) -> None:
    """`lora_bias` of PEFT's, which adds a bias to what a layer without one gives."""
    pipe = pipeline()
    names = ["attn1.to_q", "attn1.to_out.0"]  # without a bias, and with one
    config = LoraConfig(r=2, lora_alpha=2, lora_bias=True, init_lora_weights=False, target_modules=names)
    injection.add_adapter(pipe.unet, config)
    state = get_peft_model_state_dict(pipe.unet)
    assert any(key.endswith("to_q.lora_B.bias") for key in state)
    pipe.save_lora_weights(tmp_path, state)
    other = pipeline()
    other.load_lora_weights(tmp_path, adapter_name="a")
    base = pipeline().unet.get_submodule(QUERY)
    x = torch.randn(3, base.in_features)
    for path in (QUERY, f"{ATTENTION}.to_out.0"):
        ours, stock = (each.unet.get_submodule(path) for each in (other, pipe))
        assert torch.equal(ours(x), stock(x))
        assert not torch.equal(ours(x), ours.base_layer(x))


@pytest.mark.parametrize("there", [False, True], ids=["alone", "beside another"])
@pytest.mark.parametrize("kind", STRANGE)
def test_what_diffusers_does_not_load_whole_changes_nothing(kind, there, pipeline, tmp_path) -> None:
    pipe = pipeline()
    tensors = strange_dora(kind, pipe, dora(pipe, tmp_path / "dora.safetensors"))
    file = tmp_path / "strange.safetensors"
    save_file({key: one.contiguous() for key, one in tensors.items()}, file)
    if there:
        pipe.load_lora_weights(FIRST, adapter_name="first")
        pipe.set_adapters(["first"], [0.5])
    before, adapters = snapshot(pipe), pipe.get_list_adapters()
    for _ in range(2):  # the name stays free
        with pytest.raises(AdapterError) as caught:
            pipe.load_lora_weights(file, adapter_name="second")
        said = str(caught.value)
        assert str(file) in said
        assert "DoRA" in said
        assert "\n" not in said
        assert len(said) - len(str(file)) < 300
        unchanged(pipe, before, adapters)
    if there:
        assert pipe.get_active_adapters() == ["first"]
        assert pipe.unet.get_submodule(QUERY).scaling["first"] == pytest.approx(
            0.5 * Adapter.load(FIRST).modules[("unet", QUERY)].scale
        )
    pipe.load_lora_weights(FIRST, adapter_name="second")


def test_a_scale_that_diffusers_drops_is_an_error(pipeline, tmp_path) -> None:
    pipe = pipeline()
    tensors = dora(pipe, tmp_path / "dora.safetensors")
    before = snapshot(pipe)
    config = {"r": 2, "lora_alpha": 1, "use_dora": True, "target_modules": ["to_q", "to_k"], "rank_pattern": {}}
    text = json.dumps({f"unet.{key}": value for key, value in config.items()})
    save_file(tensors, tmp_path / "half.safetensors", {"lora_adapter_metadata": text})
    pipe.load_lora_weights(tmp_path / "half.safetensors", adapter_name="halved")  # told by the metadata: right
    assert pipe.unet.get_submodule(QUERY).scaling["halved"] == 0.5
    pipe.unload_lora_weights()
    real = LoraLayer.update_layer

    def at_another_scale(self, adapter_name, *args, **kwargs):
        real(self, adapter_name, *args, **kwargs)
        self.scaling[adapter_name] *= 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoraLayer, "update_layer", at_another_scale)
        with pytest.raises(AdapterError, match=r"diffusers skips or changes the scale of unet\.mid_block"):
            pipe.load_lora_weights(tmp_path / "half.safetensors", adapter_name="halved")
    unchanged(pipe, before, {})


@pytest.mark.parametrize("how", ["model", "sequential"])
def test_a_pipeline_is_offloaded_again_after_a_failure(how, pipeline, tmp_path) -> None:
    pipe = pipeline()
    save_file(strange_dora(STRANGE[0], pipe, dora(pipe, tmp_path / "d.safetensors")), tmp_path / "s.safetensors")
    getattr(pipe, f"enable_{how}_cpu_offload")(device="cpu")
    hooked = sum(hasattr(part, "_hf_hook") for part in pipe.unet.modules())
    assert hooked
    with pytest.raises(AdapterError, match="DoRA"):
        pipe.load_lora_weights(tmp_path / "s.safetensors")
    assert sum(hasattr(part, "_hf_hook") for part in pipe.unet.modules()) == hooked


def test_an_interrupt_is_undone_too(pipeline, tmp_path, monkeypatch) -> None:
    pipe = pipeline()
    dora(pipe, tmp_path / "d.safetensors")
    before = snapshot(pipe)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_adapters.handing_back._lost", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipe.load_lora_weights(tmp_path / "d.safetensors")
    unchanged(pipe, before, {})


def test_a_name_in_use(pipeline, tmp_path) -> None:
    pipe = pipeline()
    dora(pipe, tmp_path / "d.safetensors")
    pipe.load_lora_weights(FIRST, adapter_name="first")
    before, adapters = snapshot(pipe), pipe.get_list_adapters()
    with pytest.raises(AdapterError, match="the name first is in use in unet, text_encoder"):
        pipe.load_lora_weights(tmp_path / "d.safetensors", adapter_name="first")
    unchanged(pipe, before, adapters)


def test_the_state_of_a_model_comes_back(pipeline) -> None:
    pipe = pipeline()
    pipe.load_lora_weights(FIRST, adapter_name="first")
    state, before, adapters = ModelState.of(pipe.unet), snapshot(pipe), pipe.get_list_adapters()
    pipe.unet.add_adapter(LoraConfig(r=1, target_modules=["to_v", "conv1"]), "more")
    assert any("more" in key for key in snapshot(pipe))
    state.restore(pipe.unet)
    unchanged(pipe, before, adapters)
    assert pipe.unet.active_adapters() == ["first"]


# --- other kinds, folders, modules that are not there -----------------------------------------------------------------

NAME = "lora_unet_" + QUERY.replace(".", "_")


@pytest.mark.parametrize("key", ["vera_lambda_b", "oft_diag"])
@pytest.mark.parametrize("given", ["file", "dict", "hotswap"])
def test_other_kinds_are_one_line(given, key, pipeline, tmp_path) -> None:
    pipe = pipeline()
    tensors = {f"{NAME}.{key}": torch.ones(2, 2), f"{NAME}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "other.safetensors")
    before = snapshot(pipe)
    source = tensors if given == "dict" else tmp_path / "other.safetensors"
    with pytest.raises(AdapterError, match=rf"it is an? .* \({NAME}\.{key}\), which is not supported") as caught:
        pipe.load_lora_weights(source, hotswap=given == "hotswap")
    assert ("the state dict: " if given == "dict" else f"{tmp_path / 'other.safetensors'}: ") in str(caught.value)
    unchanged(pipe, before, {})


def test_a_folder_of_several_files(pipeline, tmp_path) -> None:
    pipe = pipeline()
    (tmp_path / "a.safetensors").write_bytes(FIRST.read_bytes())
    (tmp_path / "b.safetensors").write_bytes((FIRST.parent / "c3lier.safetensors").read_bytes())
    with pytest.raises(AdapterError, match=r"2 weights files, choose one with weight_name: a\.safetensors, b\.safe"):
        pipe.load_lora_weights(tmp_path)
    assert pipe.get_list_adapters() == {}
    pipe.load_lora_weights(tmp_path, weight_name="b.safetensors")


def test_a_folder_of_one_adapter_under_two_names(pipeline, tmp_path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(FIRST.read_bytes())
    pipeline().load_lora_weights(tmp_path)


def test_a_folder_of_shards(pipeline, tmp_path) -> None:
    tensors = load_file(FIRST)
    names = sorted(tensors)
    files = {f"a-0000{part + 1}-of-00002.safetensors": names[part::2] for part in range(2)}
    for file, mine in files.items():
        save_file({name: tensors[name] for name in mine}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, mine in files.items() for name in mine}}
    (tmp_path / "a.safetensors.index.json").write_text(json.dumps(index))
    pipe, whole = pipeline(), pipeline()
    pipe.load_lora_weights(tmp_path)
    whole.load_lora_weights(FIRST)
    there = snapshot(whole)
    assert all(torch.equal(one, there[key]) for key, one in snapshot(pipe).items())


@pytest.mark.parametrize("index", ["{}", "[1]", "{", '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": 1}'])
def test_a_folder_of_shards_whose_index_is_damaged(index, pipeline, tmp_path) -> None:
    for part in ("1", "2"):
        (tmp_path / f"a-0000{part}-of-00002.safetensors").write_bytes(FIRST.read_bytes() + part.encode())
    (tmp_path / "a.safetensors.index.json").write_text(index)
    with pytest.raises(AdapterError, match=r"a\.safetensors\.index\.json is not an index of weights"):
        pipeline().load_lora_weights(tmp_path)


@pytest.fixture
def with_more(tmp_path):
    """An adapter's file with two modules that no model has."""
    tensors = {}
    for name in (NAME, "lora_unet_strange_module", "lora_unet_down_blocks_9_attentions_0_proj_in"):
        tensors |= {f"{name}.lora_down.weight": torch.ones(2, 128), f"{name}.lora_up.weight": torch.ones(128, 2)}
    width = make_width()
    tensors = {key: torch.ones(*(2, width) if "down.w" in key else (width, 2)) for key in tensors}
    save_file(tensors, tmp_path / "more.safetensors")
    return tmp_path / "more.safetensors"


def make_width() -> int:
    from .conftest import make_pipeline

    return make_pipeline().unet.get_submodule(QUERY).in_features


def test_modules_that_the_model_lacks_are_left_out_with_one_warning(with_more, pipeline, caplog) -> None:
    pipe = pipeline()
    with caplog.at_level(logging.WARNING):
        pipe.load_lora_weights(with_more, adapter_name="rest")
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("lora_adapters")]
    assert "lacks 2 of the adapter's 3 modules" in line
    assert "unet.down_blocks_9_attentions_0_proj_in, unet.strange_module" in line
    layers = [path for path, part in pipe.unet.named_modules() if isinstance(part, LoraLayer)]
    assert layers == [QUERY]
    assert math.isclose(pipe.unet.get_submodule(QUERY).scaling["rest"], 1.0)


def test_strictly_they_are_an_error(with_more, pipeline) -> None:
    pipe = pipeline()
    before = snapshot(pipe)
    with pytest.raises(AdapterError, match=r"more\.safetensors: the model has no module unet\.down_blocks_9_att"):
        pipe.load_lora_weights(with_more, strict=True)
    unchanged(pipe, before, {})
    pipe.load_lora_weights(FIRST, strict=True)


def test_a_component_of_which_nothing_is_there_is_an_error(pipeline, tmp_path) -> None:
    pipe = pipeline()
    tensors = {f"lora_unet_double_blocks_0_proj.lora_{half}.weight": torch.ones(2, 2) for half in ("down", "up")}
    text = "lora_te1_text_model_encoder_layers_0_mlp_fc1"  # Flux has CLIP's text encoder too
    layer = next(part for path, part in pipe.text_encoder.named_modules() if path.endswith("layers.0.mlp.fc1"))
    tensors |= {f"{text}.lora_down.weight": torch.ones(2, layer.in_features)}
    tensors |= {f"{text}.lora_up.weight": torch.ones(layer.out_features, 2)}
    save_file(tensors, tmp_path / "flux.safetensors")
    before = snapshot(pipe)
    with pytest.raises(
        AdapterError, match=r"flux\.safetensors: the adapter is for another model: the unet has none of its 1"
    ):
        pipe.load_lora_weights(tmp_path / "flux.safetensors")
    unchanged(pipe, before, {})


# --- what a failure leaves as it was ---------------------------------------------------------------------------------


def whole_state(pipe) -> dict:
    """Everything of the models that a load may change, not only their weights."""
    found = {}
    for name, model in models(pipe).items():
        layers = {path: part for path, part in model.named_modules() if isinstance(part, LoraLayer)}
        found[name] = {
            "classes": {path: type(part) for path, part in model.named_modules()},
            "training": {path: part.training for path, part in model.named_modules()},
            "trained": {path: one.requires_grad for path, one in model.named_parameters()},
            "active": {path: list(part.active_adapters) for path, part in layers.items()},
            "fused": {path: list(part.merged_adapters) for path, part in layers.items()},
            "scales": {path: dict(part.scaling) for path, part in layers.items()},
            "disabled": {path: part.disable_adapters for path, part in layers.items()},
            "configs": {name: id(config) for name, config in getattr(model, "peft_config", {}).items()},
            "loaded": getattr(model, "_hf_peft_config_loaded", False),
        }
    return found


def prepared(pipe, how):
    """Two adapters in the pipeline, in one of the states that people have them in."""
    if how == "trained":
        for model in models(pipe).values():
            model.requires_grad_(True).train()
    if how in ("none", "trained"):
        return
    for name in ("first", "second"):
        pipe.load_lora_weights(FIRST, adapter_name=name)
    if how == "one active":
        pipe.set_adapters(["second"], [0.5])
    elif how == "disabled":
        pipe.disable_lora()
    elif how == "fused":
        pipe.fuse_lora(adapter_names=["first"], lora_scale=0.7)
    elif how == "one trained":
        pipe.unet.set_adapter("first")


@pytest.mark.parametrize("how", ["none", "trained", "one active", "disabled", "fused", "one trained"])
@pytest.mark.parametrize("failure", ["ours", "diffusers'"])
def test_a_failure_in_the_text_encoder_leaves_everything_as_it_was(failure, how, pipeline, tmp_path, monkeypatch):
    pipe = pipeline()
    tensors = strange_dora("a text encoder that fails", pipe, dora(pipe, tmp_path / "dora.safetensors"))
    prepared(pipe, how)
    before, state = snapshot(pipe), whole_state(pipe)

    def failing(real):
        def inject(*args, **kwargs):
            if any(one is pipe.text_encoder for one in args):
                raise MemoryError
            return real(*args, **kwargs)

        return inject

    for name in ("inject_at", "inject_adapter_in_model"):
        monkeypatch.setattr(injection, name, failing(getattr(injection, name)))
    with pytest.raises(MemoryError if failure == "ours" else AdapterError):
        pipe.load_lora_weights(FIRST if failure == "ours" else tensors, adapter_name="new")
    after = snapshot(pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert whole_state(pipe) == state


def test_numbers_of_no_module_are_no_adapter(pipeline, caplog) -> None:
    pipe = pipeline()
    before, state = snapshot(pipe), whole_state(pipe)
    with caplog.at_level(logging.WARNING):
        pipe.load_lora_weights({"lora_foo": torch.tensor(2.0), "lora_bar": torch.tensor(3.0)})
    assert "No LoRA keys associated to UNet2DConditionModel found" in caplog.text  # diffusers' own word
    unchanged(pipe, before, {})
    assert whole_state(pipe) == state
    with pytest.raises(AdapterError, match="lora_foo is not a key of"):
        pipe.load_lora_weights({"lora_foo": torch.ones(2, 2)})
    unchanged(pipe, before, {})
