"""`pipe.load_lora_weights` with this package: exact, reversible, all or nothing."""

import copy

import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from lora_adapters import Adapter, AdapterError, LierLaConfig, add_adapter, set_rank
from lora_adapters.convert.storage.hub_errors import HubError
from lora_adapters.types.dylora.rank_controller import controllers

from .conftest import GOLDEN, expected
from .golden_outputs import error, outputs

CASES = sorted({(name, key.split(".")[0]) for name in ("sd15", "sdxl") for key in expected(name) if ".x1.0." in key})


def wanted(name, file, weight):
    golden = expected(name)
    return {key.split(".")[-1]: golden[key] for key in golden if key.startswith(f"{file}.x{weight}.")}


def state(pipe):
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    return {f"{part}.{key}": value for part, model in parts.items() for key, value in model.state_dict().items()}


@pytest.mark.parametrize(("name", "file"), CASES)
def test_exact(name, file, pipeline):
    pipe, golden = pipeline(name), expected(name)
    base = {part: golden[f"base.{part}"] for part in outputs(pipe, golden)}
    pipe.load_lora_weights(GOLDEN / name / f"{file}.safetensors", adapter_name="golden")
    for weight in ("1.0", "0.7"):
        pipe.set_adapters(["golden"], [float(weight)])
        assert error(outputs(pipe, golden), wanted(name, file, weight), base) < 1e-3


@pytest.mark.parametrize("source", ["path", "string", "folder", "dict", "peft", "diffusers", "adapter", "not low"])
def test_sources(source, pipeline, tmp_path):
    pipe, golden = pipeline(), expected("sd15")
    base = outputs(pipe, golden)
    file = GOLDEN / "sd15" / "block_dims_alphas_conv.safetensors"
    adapter = Adapter.load(file)
    if source == "adapter":
        adapter.to_pipeline(pipe, "a")
    else:
        given = {
            "path": lambda: file,
            "string": lambda: str(file),
            "folder": lambda: adapter.save(tmp_path / "one" / "a.safetensors").parent,
            "dict": lambda: load_file(file),
            "peft": lambda: adapter.save(tmp_path / "peft", "peft"),
            "diffusers": lambda: adapter.save(tmp_path / "d.safetensors", "diffusers"),
            "not low": lambda: file,
        }[source]()
        pipe.load_lora_weights(given, adapter_name="a", low_cpu_mem_usage=source != "not low")
    assert error(outputs(pipe, golden), wanted("sd15", file.stem, "1.0"), base) < 1e-3


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere.safetensors", {}, "nowhere.safetensors does not exist"),
        (str(GOLDEN), {"weight_name": "a.safetensors"}, "has no file a.safetensors"),
        ("me/x", {"local_files_only": True}, "me/x"),
    ],
)
def test_what_is_not_there_is_the_error_that_diffusers_raises_too(source, options, message, pipeline):
    """Programs that try one place after another catch an OSError."""
    with pytest.raises(AdapterError, match=message) as caught:
        pipeline().load_lora_weights(source, **options)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, HubError) == (source == "me/x")


def test_unload_leaves_every_tensor_as_it_was(pipeline):
    pipe = pipeline()
    before = copy.deepcopy(state(pipe))
    pipe.load_lora_weights(GOLDEN / "sd15" / "dylora_conv.safetensors", adapter_name="a")
    pipe.load_lora_weights(GOLDEN / "sd15" / "c3lier.safetensors", adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.3, 0.6])
    outputs(pipe, expected("sd15"))
    pipe.unload_lora_weights()
    after = state(pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_several_adapters_add_up_and_can_be_fused_and_deleted(pipeline):
    pipe, golden = pipeline(), expected("sd15")
    adapters = {name: Adapter.load(GOLDEN / "sd15" / f"{name}.safetensors") for name in ("c3lier", "dylora")}
    base = outputs(pipe, golden)
    (adapters["c3lier"].scale(0.5) + adapters["dylora"].scale(0.7)).to_pipeline(pipe, "sum")
    together = outputs(pipe, golden)
    pipe.unload_lora_weights()
    for name in adapters:
        pipe.load_lora_weights(GOLDEN / "sd15" / f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(list(adapters), [0.5, 0.7])
    assert error(outputs(pipe, golden), together, base) < 1e-3
    pipe.fuse_lora(adapter_names=list(adapters))
    assert error(outputs(pipe, golden), together, base) < 1e-3
    with pytest.raises(AdapterError, match="fused"):
        set_rank(pipe, 4)
    pipe.unfuse_lora()
    pipe.delete_adapters("dylora")
    assert not controllers(pipe)
    pipe.set_adapters(["c3lier"])
    assert error(outputs(pipe, golden), wanted("sd15", "c3lier", "1.0"), base) < 1e-3
    pipe.disable_lora()
    assert error(outputs(pipe, golden), base, base) < 1e-4  # fusing and unfusing rounds


@pytest.mark.parametrize("order", [("dylora", "lierla"), ("lierla", "dylora")])
def test_dylora_and_plain_on_the_same_layers(order, pipeline, tmp_path):
    pipe, golden = pipeline(), expected("sd15")
    base = outputs(pipe, golden)
    for name in order:
        pipe.load_lora_weights(GOLDEN / "sd15" / f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(["dylora"])
    for rank in (4, 8, 12):
        set_rank(pipe, rank, "dylora")
        other = pipeline()
        cut = Adapter.load(GOLDEN / "sd15" / "dylora.safetensors").truncate(rank).save(tmp_path / f"{rank}.safetensors")
        other.load_lora_weights(cut)
        assert error(outputs(pipe, golden), outputs(other, golden), base) < 1e-4
    pipe.set_adapters(["lierla"])
    assert error(outputs(pipe, golden), wanted("sd15", "lierla", "1.0"), base) < 1e-3
    with pytest.raises(AdapterError, match=r"rank 5 .*4, 8, 12, 16"):
        set_rank(pipe, 5)


def test_hotswap_of_the_unet(pipeline):
    pipe, golden = pipeline(), expected("sd15")
    base = outputs(pipe, golden)
    pipe.load_lora_weights(GOLDEN / "sd15" / "unet_only.safetensors", adapter_name="a")
    modules = Adapter.load(GOLDEN / "sd15" / "unet_only.safetensors").scale(-2)
    pipe.load_lora_weights(modules, adapter_name="a", hotswap=True)
    other = pipeline()
    modules.to_pipeline(other, "a")
    assert error(outputs(pipe, golden), outputs(other, golden), base) < 1e-4
    with pytest.raises(AdapterError, match="no adapter b to swap"):
        pipe.load_lora_weights(modules, adapter_name="b", hotswap=True)


def test_half_precision(pipeline):
    pipe = pipeline().to(torch.bfloat16)
    pipe.load_lora_weights(GOLDEN / "sd15" / "c3lier.safetensors")
    kinds = {p.dtype for model in (pipe.unet, pipe.text_encoder) for p in model.parameters()}
    assert kinds == {torch.bfloat16}


@pytest.mark.parametrize(
    ("of_model", "of_layer"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float32)],
)
def test_each_layer_has_the_dtype_that_it_computes_in(of_model, of_layer, pipeline):
    """Also where one part of the model, the first, is kept more precise than the others, or less."""
    pipe = pipeline().to(of_model)
    for part in (pipe.unet.conv_in, pipe.unet.time_embedding, pipe.unet.mid_block):
        part.to(of_layer)
    pipe.load_lora_weights(GOLDEN / "sd15" / "c3lier.safetensors", adapter_name="a")
    layers = [layer for layer in pipe.unet.modules() if isinstance(layer, LoraLayer)]
    assert {layer.base_layer.weight.dtype for layer in layers} == {of_model, of_layer}
    for layer in layers:
        factors = (layer.lora_A["a"].weight, layer.lora_B["a"].weight)
        assert {factor.dtype for factor in factors} == {layer.base_layer.weight.dtype}


def test_layers_stored_in_eight_bits_have_the_dtype_that_they_are_cast_to(pipeline):
    pipe = pipeline()
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    apply_layerwise_casting(pipe.text_encoder, torch.float8_e4m3fn, torch.bfloat16)  # a model that says float8
    pipe.load_lora_weights(GOLDEN / "sd15" / "c3lier.safetensors")
    for model in (pipe.unet, pipe.text_encoder):
        assert {value.dtype for key, value in model.named_parameters() if ".lora_" in key} == {torch.bfloat16}


def test_save_lora_weights_and_back(pipeline, tmp_path):
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    pipe, golden = pipeline(), expected("sd15")
    base = outputs(pipe, golden)
    pipe.load_lora_weights(GOLDEN / "sd15" / "dylora_conv.safetensors", adapter_name="default")
    here = outputs(pipe, golden)
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        **_collate_lora_metadata(parts),
    )
    other = pipeline()
    other.load_lora_weights(tmp_path)
    assert error(outputs(other, golden), here, base) < 1e-4


@pytest.mark.parametrize("fault", ["architecture", "shape", "half", "truncated", "module", "name", "late"])
def test_a_failed_load_leaves_the_pipeline_as_it_was(fault, pipeline, tmp_path, monkeypatch, recwarn):
    pipe = pipeline()
    pipe.load_lora_weights(GOLDEN / "sd15" / "lierla.safetensors", adapter_name="first")
    golden = expected("sd15")
    before, was = copy.deepcopy(state(pipe)), outputs(pipe, golden)
    whole = GOLDEN / "sd15" / "c3lier.safetensors"
    tensors = load_file(whole)
    up = "lora_te_text_model_encoder_layers_2_mlp_fc2.lora_up.weight"
    file, name = tmp_path / "bad.safetensors", "second"
    if fault == "architecture":
        file = GOLDEN / "sdxl" / "lierla_xl.safetensors"
    elif fault == "shape":
        save_file({**tensors, up: torch.zeros(25, 8)}, file)
    elif fault == "half":
        save_file({key: value for key, value in tensors.items() if key != up}, file)
    elif fault == "truncated":
        file.write_bytes(whole.read_bytes()[:20000])
    elif fault == "module":
        save_file({key.replace("proj_in", "proj_inn"): value for key, value in tensors.items()}, file)
    elif fault == "name":
        file, name = whole, "first"
    else:
        file = whole
        place = __import__("lora_adapters.injection", fromlist=["place"]).place

        def failing(model, *args, **kwargs):
            if model is pipe.unet:
                raise RuntimeError("out of memory")
            place(model, *args, **kwargs)

        monkeypatch.setattr("lora_adapters.injection.place", failing)
    with pytest.raises(RuntimeError if fault == "late" else AdapterError) as caught:
        pipe.load_lora_weights(file, adapter_name=name, strict=fault == "module")
    if fault != "late":
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)
    after = state(pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert pipe.get_list_adapters() == {"unet": ["first"], "text_encoder": ["first"]}
    assert error(outputs(pipe, golden), was, was) < 1e-6
    assert not [one for one in recwarn if "newly initialized" in str(one.message)]


@pytest.mark.parametrize("extra", ["use_dora", "lora_bias"])
def test_an_adapter_that_is_more_than_pairs_is_not_taken_for_one(extra, pipeline):
    pipe = pipeline()
    pipe.unet.add_adapter(LierLaConfig(r=2, **{extra: True}), "more")
    said = {"use_dora": "DoRA's magnitudes", "lora_bias": r"biases \(lora_bias\)"}[extra]
    with pytest.raises(AdapterError, match=rf"adapter more is not a plain LoRA: unet\.\S+ has {said}$"):
        Adapter.from_pipeline(pipe, "more")
    pipe.unet.add_adapter(LierLaConfig(r=2), "plain")
    assert {one.rank for one in Adapter.from_pipeline(pipe, "plain").modules.values()} == {2}


@pytest.mark.parametrize("wrap", [torch.compile, lambda model: model], ids=["compiled", "as it is"])
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed"])
def test_wrapped_models_give_an_adapter_that_opens_again(mixed, wrap, pipeline, tmp_path):
    pipe = pipeline()
    wrapped = {
        part: wrap(get_peft_model(getattr(pipe, part), LierLaConfig(r=4), mixed=mixed))
        for part in ("unet", "text_encoder")
    }
    file = Adapter.from_models(wrapped).save(tmp_path / "wrapped.safetensors")
    plain = pipeline()
    plain.load_lora_weights(file, adapter_name="a")
    for part, model in wrapped.items():
        back, live = Adapter.load(file).modules, Adapter.from_models({part: model}).modules
        for module, one in live.items():
            torch.testing.assert_close(back[module].down, one.down, rtol=0, atol=0)
    assert Adapter.from_pipeline(plain, "a").modules.keys() == Adapter.load(file).modules.keys()
    pipe.unet = wrapped["unet"]
    assert Adapter.from_pipeline(pipe).modules.keys() == Adapter.load(file).modules.keys()


@pytest.mark.parametrize("file", ["c3lier", "dylora"])
def test_what_is_trained_after_a_load_is_what_diffusers_and_transformers_leave(file, pipeline):
    """The U-Net's adapter can be trained, a text encoder's is for inference until it is activated again."""
    pipe = pipeline()
    pipe.unet.train()
    pipe.text_encoder.train()
    pipe.load_lora_weights(GOLDEN / "sd15" / f"{file}.safetensors", adapter_name="a")
    for model, trained in ((pipe.unet, True), (pipe.text_encoder, False)):
        factors = [value for key, value in model.named_parameters() if ".lora_" in key]
        assert {factor.requires_grad for factor in factors} == {trained}
        assert model.peft_config["a"].inference_mode is not trained
        assert model.training is trained
    pipe.set_adapters("a")
    assert all(value.requires_grad for key, value in pipe.text_encoder.named_parameters() if ".lora_" in key)


def test_models_in_parallel_training_are_saved_whole_and_loaded_into_when_they_are_out_of_it(pipeline):
    """Their part must not be left out of the adapter: the text encoder's alone would be saved without a word."""
    pipe = pipeline()
    for part in (pipe.unet, pipe.text_encoder):
        add_adapter(part, LierLaConfig(r=2), "a")
    modules = Adapter.from_pipeline(pipe, "a").modules
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for wrap in (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel):
            wrapped = {"unet": wrap(pipe.unet), "text_encoder": pipe.text_encoder}
            assert Adapter.from_models(wrapped, "a").modules.keys() == modules.keys()
            pipe.unet, inner = wrapped["unet"], pipe.unet
            assert Adapter.from_pipeline(pipe, "a").modules.keys() == modules.keys()
            with pytest.raises(
                AdapterError, match=rf"the unet is wrapped in a {wrap.__name__}, .* pipe.unet = pipe.unet.module$"
            ):
                pipe.load_lora_weights(GOLDEN / "sd15" / "c3lier.safetensors", adapter_name="b")
            assert set(pipe.text_encoder.peft_config) == {"a"}
            pipe.unet = inner
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("name", "architecture"), [("sd15", "sd"), ("sdxl", "sdxl")])
def test_the_live_model_tells_which_architecture_a_small_adapter_is_for(name, architecture, pipeline, tmp_path):
    pipe = pipeline(name)
    query = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"  # both have it
    pipe.unet.add_adapter(LierLaConfig(r=2, target_modules=[query], init_lora_weights=False), "small")
    adapter = Adapter.from_pipeline(pipe, "small")
    assert {module.path for module in adapter.modules} == {query}
    assert adapter.architecture == architecture
    assert Adapter.load(adapter.save(tmp_path / "a.safetensors")).architecture == architecture


def test_modules_that_are_in_no_table_come_back_out_of_a_pipeline(pipeline, tmp_path):
    pipe = pipeline("sdxl")
    tensors = {}
    for name, out, inner in (
        ("lora_te2_text_projection", *pipe.text_encoder_2.text_projection.weight.shape),
        ("lora_unet_label_emb_0_0", *pipe.unet.add_embedding.linear_1.weight.shape),
        ("lora_unet_add_embedding_linear_2", *pipe.unet.add_embedding.linear_2.weight.shape),
    ):
        tensors |= {f"{name}.lora_down.weight": torch.randn(2, inner), f"{name}.lora_up.weight": torch.randn(out, 2)}
    save_file(tensors, tmp_path / "outer.safetensors")
    pipe.load_lora_weights(tmp_path / "outer.safetensors", adapter_name="outer", strict=True)
    assert {"outer"} == set(pipe.text_encoder_2.text_projection.lora_A) == set(pipe.unet.add_embedding.linear_2.lora_A)
    for format in ("kohya", "diffusers", "peft"):
        path = Adapter.from_pipeline(pipe, "outer").save(tmp_path / format / "a.safetensors", format)
        back = Adapter.load(path)
        for module, one in Adapter.load(tmp_path / "outer.safetensors").modules.items():
            torch.testing.assert_close(back.modules[module].delta(), one.delta())
        other = pipeline("sdxl")
        other.load_lora_weights(path, strict=True)
