"""Adapters in live pipelines of diffusion transformers: exact, all or nothing, and never in diffusers' way."""

import copy
import subprocess
import sys

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

from lora_adapters import C3LierConfig, DyLoraConfig, LierLaConfig, set_rank
from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.formats.metadata import DyLora
from lora_adapters.injection import live_path
from lora_adapters.types.layers import layers

from .transformers import CONFIGS, flux, flux_file, pair, sd3, transformer


def weights(pipe):
    names = ("transformer", "text_encoder", "text_encoder_2")
    models = {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}
    return {
        f"{name}.{key}": value.clone() for name, model in models.items() for key, value in model.state_dict().items()
    }


def scale(pipe, component, path, adapter="a"):
    layer = getattr(pipe, component).get_submodule(path)
    return layer.r[adapter], layer.scaling[adapter]


def test_every_module_has_its_own_rank_and_alpha():
    pipe = flux()
    pipe.load_lora_weights(flux_file(), adapter_name="a")
    assert scale(pipe, "transformer", "transformer_blocks.0.attn.to_k") == (4, 0.5)
    assert scale(pipe, "transformer", "transformer_blocks.1.attn.add_v_proj") == (2, 1.5)
    assert scale(pipe, "transformer", "transformer_blocks.1.ff.net.2") == (3, 1.0)
    assert scale(pipe, "transformer", "single_transformer_blocks.1.proj_mlp") == (4, 0.25)
    assert scale(pipe, "text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q") == (2, 0.5)
    layer = pipe.transformer.norm_out.linear
    up = flux_file()["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]
    assert torch.equal(layer.lora_B["a"].weight, torch.cat([up[16:], up[:16]]))


def test_weights_of_all_components_are_set_fused_and_unloaded():
    pipe = flux()
    before = weights(pipe)
    pipe.load_lora_weights(flux_file(), adapter_name="a")
    adapter = Adapter.from_tensors(flux_file(), {"ss_base_model_version": "flux1"})
    pipe.set_adapters(["a"], [0.5])
    assert scale(pipe, "text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q") == (2, 0.25)
    components = ["transformer", "text_encoder", "text_encoder_2"]
    pipe.fuse_lora(components=components)
    for component in components:
        for module in (one for one in adapter.modules if one.component == component):
            live = live_path(getattr(pipe, component), module.path)
            layer = getattr(pipe, component).get_submodule(live).get_base_layer()
            wanted = before[f"{component}.{live}.weight"] + 0.5 * adapter.modules[module].delta()
            torch.testing.assert_close(layer.weight.data, wanted, atol=1e-6, rtol=1e-5)
    pipe.unfuse_lora(components=components)
    pipe.unload_lora_weights()
    after = weights(pipe)
    assert set(after) == set(before)
    assert all(torch.allclose(after[key], value, atol=1e-5) for key, value in before.items())


def test_unloading_gives_the_very_weights_back():
    pipe = flux()
    before = weights(pipe)
    pipe.load_lora_weights(flux_file(), adapter_name="a")
    pipe.load_lora_weights(flux_file(), adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.3, -1.0])
    pipe.unload_lora_weights()
    after = weights(pipe)
    assert set(after) == set(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_dylora_has_its_dial(tmp_path):
    adapter = Adapter.from_tensors(flux_file(), {"ss_base_model_version": "flux1"}).as_dylora(DyLora(unit=1))
    path = adapter.save(tmp_path / "a.safetensors", format="kohya")
    pipe = flux()
    pipe.load_lora_weights(path, adapter_name="a")
    set_rank(pipe, 2)
    layer = pipe.transformer.get_submodule("transformer_blocks.0.attn.to_q")
    module = ModuleName("transformer", "transformer_blocks.0.attn.to_q")
    x = torch.randn(1, 16)
    wanted = layer.get_base_layer()(x) + x @ Adapter.load(path).truncate(2).modules[module].delta().T
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)


def test_back_out_of_the_pipeline_into_kohyas_format(tmp_path):
    pipe = flux()
    pipe.load_lora_weights(flux_file(), adapter_name="a")
    adapter = Adapter.from_pipeline(pipe, "a")
    assert adapter.architecture == "flux"
    again = Adapter.load(adapter.save(tmp_path / "a.safetensors", format="kohya"))
    wanted = Adapter.from_tensors(flux_file(), {"ss_base_model_version": "flux1"})
    assert set(again.modules) == set(wanted.modules)
    for module, change in wanted.modules.items():
        torch.testing.assert_close(again.modules[module].delta(), change.delta())


def test_a_broken_file_changes_nothing():
    pipe = flux()
    before, state = weights(pipe), copy.deepcopy(pipe.transformer.config)
    tensors = flux_file()
    del tensors["lora_unet_single_blocks_1_linear1.lora_up.weight"]
    with pytest.raises(AdapterError, match="single_blocks_1_linear1"):
        pipe.load_lora_weights(tensors, adapter_name="a")
    wrong = {**flux_file(), **pair("lora_unet_double_blocks_0_img_attn_proj", 24, 16, 2, 1.0)}
    with pytest.raises(AdapterError, match=r"made for a weight of \[24, 16\]"):
        pipe.load_lora_weights(wrong, adapter_name="a")
    assert pipe.transformer.config == state
    assert weights(pipe).keys() == before.keys()
    assert not hasattr(pipe.transformer, "peft_config")
    pipe.load_lora_weights(flux_file(), adapter_name="a")  # the name is free


def test_modules_that_the_model_lacks_are_left_out_with_one_warning(caplog):
    pipe = flux()
    tensors = {**flux_file(), **pair("lora_unet_double_blocks_18_img_attn_qkv", 48, 16, 2, 1.0)}
    pipe.load_lora_weights(tensors, adapter_name="a")
    assert "lacks 3 of the adapter's" in caplog.text
    with pytest.raises(AdapterError, match=r"no module transformer\.transformer_blocks\.18\.attn\.to_q"):
        pipe.load_lora_weights(tensors, adapter_name="b", strict=True)


def test_sd3_with_swapped_halves_in_its_last_block():
    pipe = sd3()
    name = "lora_unet_joint_blocks_2_context_block_adaLN_modulation_1"
    tensors = {**pair(name, 32, 16, 2, 1.0), **pair("lora_unet_joint_blocks_0_x_block_attn2_qkv", 48, 16, 3, 2.0)}
    pipe.load_lora_weights(tensors, adapter_name="a")
    up = tensors[f"{name}.lora_up.weight"]
    layer = pipe.transformer.get_submodule("transformer_blocks.2.norm1_context.linear")
    assert torch.equal(layer.lora_B["a"].weight, torch.cat([up[16:], up[:16]]))
    assert scale(pipe, "transformer", "transformer_blocks.0.attn2.to_v") == (3, pytest.approx(2 / 3))


def control_lora(columns=8):
    """A Flux Control LoRA: an input twice as wide as the model's, and norms."""
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "transformer.x_embedder.lora_A.weight": torch.randn(2, columns, generator=draw),
        "transformer.x_embedder.lora_B.weight": torch.randn(16, 2, generator=draw),
    }
    for name in ("norm_q", "norm_k"):
        tensors[f"transformer.transformer_blocks.0.attn.{name}.weight"] = torch.randn(8, generator=draw)
    return tensors


@pytest.mark.parametrize("norms", [True, False])
def test_what_only_diffusers_knows_is_loaded_by_it(norms):
    tensors = {key: value for key, value in control_lora().items() if norms or "norm" not in key}
    pipe = flux()
    pipe.load_lora_weights(dict(tensors), adapter_name="a")
    assert pipe.transformer.x_embedder.in_features == 8
    assert torch.equal(pipe.transformer.x_embedder.lora_A["a"].weight, tensors["transformer.x_embedder.lora_A.weight"])
    pipe.unload_lora_weights()


def test_what_diffusers_does_not_load_either_is_an_error():
    pipe = flux()
    with pytest.raises(AdapterError, match="is not a key of an adapter file"):
        pipe.load_lora_weights({"nothing.known.weight": torch.zeros(2, 2)}, adapter_name="a")
    assert not hasattr(pipe.transformer, "peft_config")


@pytest.mark.parametrize("key", ["lora_foo", "transformer.transformer_blocks.0.attn.norm_k_unknown.weight"])
def test_where_no_layer_is_named_diffusers_answer_stands(key):
    """A line in its log, and nothing loaded; diffusers' own tests ask for it."""
    pipe = flux()
    before = weights(pipe)
    pipe.load_lora_weights({key: torch.tensor(2.0)})
    assert weights(pipe).keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(pipe).items())
    assert not hasattr(pipe.transformer, "peft_config")


def test_a_control_lora_behind_a_lora_of_the_narrow_input_is_an_error_of_both_kinds():
    """Diffusers' message and type, after the reason for which this package does not read it."""
    pipe = flux()
    narrow, wide = (
        {key: value for key, value in control_lora(columns).items() if "norm" not in key} for columns in (4, 8)
    )
    pipe.load_lora_weights(narrow, adapter_name="a")
    before = weights(pipe)
    told = r"x_embedder is made for a weight of \[16, 8\].*size mismatch for x_embedder.lora_A.b.weight"
    with pytest.raises(AdapterError, match=told) as caught:
        pipe.load_lora_weights(wide, adapter_name="b")
    assert isinstance(caught.value, RuntimeError)
    assert "\n" not in str(caught.value)
    assert weights(pipe).keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(pipe).items())
    assert pipe.get_active_adapters() == ["a"]


def test_a_transformer_of_no_family_is_left_to_diffusers(monkeypatch):
    pipe = flux()
    called = []
    monkeypatch.setattr("lora_adapters.pipeline.is_known", lambda pipe: False)
    monkeypatch.setattr("lora_adapters.pipeline.load", lambda *args, **kwargs: called.append(args))
    tensors = {
        "transformer.x_embedder.lora_A.weight": torch.randn(2, 4),
        "transformer.x_embedder.lora_B.weight": torch.randn(16, 2),
    }
    pipe.load_lora_weights(tensors, adapter_name="a")
    assert not called
    assert "a" in pipe.transformer.x_embedder.lora_A


# --- an own loop ---------------------------------------------------------------------------------------------------


def kohyas(name, model):
    """What kohya's and musubi's trainers adapt of a tiny model of that class, by names written out here."""
    linear = {path for path, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    blocks = {path for path in linear if path.partition(".")[2]}
    if name in (
        "FluxTransformer2DModel",
        "ChromaTransformer2DModel",
        "Flux2Transformer2DModel",
        "SD3Transformer2DModel",
    ):
        return {path for path in linear if path.startswith(("transformer_blocks.", "single_transformer_blocks."))}
    if name == "QwenImageTransformer2DModel":
        return {path for path in blocks if path.startswith("transformer_blocks.") and "_mod." not in path}
    if name == "ZImageTransformer2DModel":
        return {path for path in blocks if path.startswith("layers.") and "adaLN" not in path}
    starts = ("layers.", "noise_refiner.", "context_refiner.", "norm_out.")
    return {path for path in blocks if path.startswith(starts)}


@pytest.mark.parametrize("config", [LierLaConfig, C3LierConfig, DyLoraConfig])
@pytest.mark.parametrize("name", CONFIGS)
def test_configs_adapt_what_kohyas_trainers_do(name, config):
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}: 0.36 is the first")
    model = transformer(name)
    wanted = kohyas(name, model)
    inject_adapter_in_model(config(r=2), model)
    assert {path for path, _ in layers(model, "default")} == wanted


def test_as_many_modules_as_in_kohyas_files():
    """10 in each double block and 3 in each single one; in diffusers q, k, v and the MLP are apart."""
    model = transformer("FluxTransformer2DModel")
    inject_adapter_in_model(LierLaConfig(r=2), model)
    adapter = Adapter.from_models({"transformer": model})
    from lora_adapters.convert.formats.fused import named_changes

    assert len(named_changes(adapter.pairs(), adapter.family)) == 2 * 10 + 2 * 3
    peft_model = get_peft_model(transformer("SD3Transformer2DModel"), LierLaConfig(r=2))
    adapter = Adapter.from_models({"transformer": peft_model})
    assert len(named_changes(adapter.pairs(), adapter.family)) == 2 * 10 + 7 + 2


def test_blocks_have_ranks_of_their_own():
    model = transformer("FluxTransformer2DModel")
    config = LierLaConfig(r=2, block_dims=[1, 0] + [4] * 17 + [3] * 38)
    inject_adapter_in_model(config, model)
    ranks = {path: layer.r["default"] for path, layer in layers(model, "default")}
    assert ranks["transformer_blocks.0.attn.to_q"] == 1
    assert not any(path.startswith("transformer_blocks.1.") for path in ranks)
    assert ranks["single_transformer_blocks.1.proj_mlp"] == 3
    with pytest.raises(AdapterError, match=r"block_dims has 25 values, Flux\.1 has 57 blocks"):
        inject_adapter_in_model(LierLaConfig(r=2, block_dims=[1] * 25), transformer("FluxTransformer2DModel"))


# --- diffusers without and with the package ------------------------------------------------------------------------


def test_every_mixin_of_a_family_is_changed_and_no_other():
    from diffusers.loaders import lora_pipeline

    from lora_adapters.convert.families.registry import FAMILIES

    changed = {
        name
        for name, mixin in vars(lora_pipeline).items()
        if name.endswith("LoraLoaderMixin")
        and "load_lora_weights" in vars(mixin)
        and hasattr(mixin.load_lora_weights, "stock")
    }
    known = {name for family in FAMILIES for name in family.marks.mixins}
    stable = {"StableDiffusionLoraLoaderMixin", "StableDiffusionXLLoraLoaderMixin"}
    assert changed == {name for name in known | stable if hasattr(lora_pipeline, name)}


@pytest.mark.slow
def test_what_loads_without_the_package_loads_with_it(tmp_path):
    """Each of diffusers' own spellings, in a process without this package, and in this one."""
    model = transformer("FluxTransformer2DModel")
    inject_adapter_in_model(LoraConfig(target_modules=["to_q", "proj_mlp", "x_embedder"]), model)
    from peft.utils import get_peft_model_state_dict

    diffusers.FluxPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(model))
    script = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from tests.lora_adapters.transformers import flux\n"
        "assert 'lora_adapters' not in sys.modules\n"
        "pipe = flux(); pipe.load_lora_weights(sys.argv[1], adapter_name='a')\n"
        "assert 'a' in pipe.transformer.x_embedder.lora_A"
    )
    root = __file__.rpartition("/tests/")[0]
    subprocess.run([sys.executable, "-c", script, str(tmp_path), root], check=True, cwd=tmp_path)
    pipe = flux()
    pipe.load_lora_weights(tmp_path, adapter_name="a")
    assert "a" in pipe.transformer.x_embedder.lora_A


def test_norms_of_root_mean_squares_are_changed_and_given_back():
    """Flux.1's of queries and keys, and T5's, as ComfyUI's extraction writes them."""
    pipe, wanted, bare = flux(), flux(), flux()
    prefixes = {"transformer": "diffusion_model", "text_encoder_2": "text_encoders.t5xxl.transformer"}
    tensors, draw = {}, torch.Generator().manual_seed(0)
    for component, prefix in prefixes.items():
        for each in (pipe, wanted, bare):
            getattr(each, component).load_state_dict(getattr(pipe, component).eval().state_dict())
            getattr(each, component).eval()
        for path, layer in getattr(wanted, component).named_modules():
            if type(layer).__name__ in ("RMSNorm", "T5LayerNorm"):
                change = torch.randn(layer.weight.shape, generator=draw)
                tensors[f"{prefix}.{path}.diff"] = change
                layer.weight.data += change
    assert len(tensors) == 15

    @torch.no_grad()
    def outputs(of) -> list[torch.Tensor]:
        torch.manual_seed(1)
        call = {"hidden_states": torch.randn(1, 4, 4), "encoder_hidden_states": torch.randn(1, 3, 12)}
        call |= {"pooled_projections": torch.randn(1, 8), "timestep": torch.tensor([0.5])}
        call |= {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
        return [of.transformer(**call).sample, of.text_encoder_2(torch.tensor([[1, 2, 3]])).last_hidden_state]

    pipe.load_lora_weights(tensors, adapter_name="a")
    torch.testing.assert_close(outputs(pipe), outputs(wanted))
    assert all((one - other).abs().max() > 0.01 for one, other in zip(outputs(pipe), outputs(bare), strict=True))
    pipe.fuse_lora(components=list(prefixes))
    torch.testing.assert_close(outputs(pipe), outputs(wanted))
    pipe.unfuse_lora(components=list(prefixes))
    pipe.unload_lora_weights()
    assert all(torch.equal(one, other) for one, other in zip(outputs(pipe), outputs(bare), strict=True))
