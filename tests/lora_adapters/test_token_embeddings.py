"""Embeddings of tokens that a file has beside its adapter: in the pipeline with it, and gone with it."""

import copy
import logging

import pytest
import torch
from safetensors.torch import save_file

from lora_adapters import Adapter, AdapterError
from tests.lora_adapters.pipelines import make

FLAT = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
TEXT = "lora_te{}_text_model_encoder_layers_0_mlp_fc1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def sd(folder):
    return make("StableDiffusion", folder)


@pytest.fixture
def sdxl(folder):
    return make("StableDiffusionXL", folder)


def pair(model, path, name):
    layer = model.get_submodule(path)
    return {
        f"{name}.lora_down.weight": torch.randn(2, layer.in_features),
        f"{name}.lora_up.weight": torch.randn(layer.out_features, 2),
    }


def adapter_of(pipe):
    return pair(pipe.unet, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", FLAT)


def encoders(pipe):
    names = [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")]
    return [(getattr(pipe, text), getattr(pipe, tokens)) for text, tokens in names if hasattr(pipe, text)]


def state(pipe):
    """Everything that embeddings change."""
    return [
        (
            text.get_input_embeddings().weight.detach().clone(),
            text.get_input_embeddings().num_embeddings,
            text.config.vocab_size,
            tokenizer.get_vocab(),
            tokenizer("a mytok of mytok_1").input_ids,
            [part.eos_token_id for part in text.modules() if hasattr(part, "eos_token_id")],
        )
        for text, tokenizer in encoders(pipe)
    ]


def encoded(pipe, prompt):
    return pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)


def assert_same(pipe, before):
    for (weight, *facts), (was, *known) in zip(state(pipe), before, strict=True):
        assert torch.equal(weight, was)
        assert facts == known


def row(text, tokenizer, token):
    return text.get_input_embeddings()(torch.tensor([tokenizer.convert_tokens_to_ids(token)]))[0]


@pytest.mark.parametrize("end", ["string_to_param.*", "emb_params", "clip_l", "<mytok>"])
def test_the_images_are_those_of_a_textual_inversion(sd, folder, tmp_path, end):
    """diffusers' own load_textual_inversion is the reference, with the same LoRA beside it."""
    tensors, vectors = adapter_of(sd), torch.randn(2, sd.text_encoder.config.hidden_size)
    save_file({**tensors, f"bundle_emb.mytok.{end}": vectors}, tmp_path / "both.safetensors")
    sd.load_lora_weights(tmp_path / "both.safetensors", adapter_name="a")
    theirs = make("StableDiffusion", folder)
    theirs.load_lora_weights(tensors, adapter_name="a")
    theirs.load_textual_inversion({"mytok": vectors})
    assert sd.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    assert sd.text_encoder.state_dict().keys() == make("StableDiffusion", folder).text_encoder.state_dict().keys()
    ours, wanted = (
        pipe("a mytok of", num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").images
        for pipe in (sd, theirs)
    )
    assert (ours == wanted).all()


@pytest.mark.parametrize("leave", [lambda pipe: pipe.unload_lora_weights(), lambda pipe: pipe.delete_adapters("a"),
                                   lambda pipe: pipe.delete_adapters(adapter_names=["a"])])  # fmt: skip
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_unloading_leaves_no_trace(kind, leave, request):
    pipe = request.getfixturevalue(kind)
    before, tensors = state(pipe), adapter_of(pipe)
    for name, (text, _) in zip(("clip_l", "clip_g"), encoders(pipe), strict=False):
        tensors[f"bundle_emb.mytok.{name}"] = torch.randn(3, text.config.hidden_size)
    pipe.load_lora_weights(dict(tensors), adapter_name="a")
    for name, (text, tokenizer) in zip(("clip_l", "clip_g"), encoders(pipe), strict=False):
        for number, token in enumerate(("mytok", "mytok_1", "mytok_2")):
            assert torch.equal(row(text, tokenizer, token), tensors[f"bundle_emb.mytok.{name}"][number])
    assert encoded(pipe, "a mytok")[0].isfinite().all()
    leave(pipe)
    assert_same(pipe, before)


def test_the_pooled_output_is_of_the_end_of_the_text(sdxl):
    """Configs of SDXL's second text encoder have the old end, 2, with which CLIP takes the highest id for it."""
    model = sdxl.text_encoder_2.text_model
    model.eos_token_id = 2
    before = state(sdxl)
    plain = encoded(sdxl, "a of")[2]
    tensors = {**adapter_of(sdxl), "bundle_emb.mytok.clip_g": torch.randn(1, sdxl.text_encoder_2.config.hidden_size)}
    sdxl.load_lora_weights(tensors)
    assert torch.equal(encoded(sdxl, "a of")[2], plain)
    ids = sdxl.tokenizer_2("a mytok of", return_tensors="pt").input_ids
    output = sdxl.text_encoder_2(ids, output_hidden_states=True)
    last = model.final_layer_norm(output.hidden_states[-1])[:, -1]
    torch.testing.assert_close(output.text_embeds, sdxl.text_encoder_2.text_projection(last))
    sdxl.unload_lora_weights()
    assert_same(sdxl, before)


def test_the_embeddings_of_others_stay(sd):
    """Another adapter's, the same token of two adapters, and one that the user has added later."""
    before, width = state(sd), sd.text_encoder.config.hidden_size
    mine, other, users = torch.randn(2, width), torch.randn(1, width), torch.randn(1, width)
    tensors = adapter_of(sd)
    sd.load_lora_weights({**tensors, "bundle_emb.mytok.emb_params": mine}, adapter_name="a")
    both = {"bundle_emb.mytok.emb_params": mine, "bundle_emb.other.emb_params": other}
    sd.load_lora_weights({**tensors, **both}, adapter_name="b")
    sd.load_textual_inversion({"users": users})
    sd.delete_adapters("a")
    held = {"mytok": mine[0], "mytok_1": mine[1], "other": other[0], "users": users[0]}
    assert all(torch.equal(row(sd.text_encoder, sd.tokenizer, token), vector) for token, vector in held.items())
    sd.delete_adapters("b")
    assert torch.equal(row(sd.text_encoder, sd.tokenizer, "users"), users[0])
    assert len(sd.tokenizer) == len(before[0][3]) + 1
    sd.unload_textual_inversion("users")  # which leaves the sizes in configs as they are
    assert torch.equal(sd.text_encoder.get_input_embeddings().weight, before[0][0])
    assert sd.tokenizer.get_vocab() == before[0][3]


def test_what_cannot_be_put_there_changes_nothing(sd):
    before, tensors = state(sd), adapter_of(sd)
    width = sd.text_encoder.config.hidden_size
    wide = {**tensors, "bundle_emb.mytok.emb_params": torch.randn(1, width + 1)}
    with pytest.raises(AdapterError, match=rf"mytok.emb_params has the shape \[1, {width + 1}\], but .* {width} wide"):
        sd.load_lora_weights(wide)
    sd.load_lora_weights({**tensors, "bundle_emb.mytok.emb_params": torch.zeros(1, width)}, adapter_name="a")
    with pytest.raises(AdapterError, match="already has the token mytok with another embedding"):
        sd.load_lora_weights({**tensors, "bundle_emb.mytok.emb_params": torch.ones(1, width)}, adapter_name="b")
    assert list(sd.unet.peft_config) == ["a"]
    sd.load_lora_weights({**tensors, "bundle_emb.mytok.emb_params": torch.ones(1, width)}, "a", hotswap=True)
    assert torch.equal(row(sd.text_encoder, sd.tokenizer, "mytok"), torch.ones(width))
    sd.unload_lora_weights()
    assert_same(sd, before)


def test_a_failure_half_way(sdxl, monkeypatch):
    before, tensors = state(sdxl), adapter_of(sdxl)
    for end, text in (("clip_l", sdxl.text_encoder), ("clip_g", sdxl.text_encoder_2)):
        tensors[f"bundle_emb.mytok.{end}"] = torch.randn(1, text.config.hidden_size)

    def broken(*args):
        raise MemoryError

    monkeypatch.setattr(sdxl.tokenizer_2, "add_tokens", broken)
    with pytest.raises(MemoryError):
        sdxl.load_lora_weights(tensors)
    monkeypatch.undo()
    assert_same(sdxl, before)
    assert not getattr(sdxl.unet, "peft_config", {})


def test_a_pipeline_without_a_place_for_them(sd, caplog):
    tensors = {**adapter_of(sd), "bundle_emb.mytok.clip_g": torch.ones(1, 4), "bundle_emb.mytok.t5": torch.ones(1, 4)}
    before = state(sd)
    with caplog.at_level(logging.WARNING):
        sd.load_lora_weights(tensors)
    assert "left out: mytok.clip_g, mytok.t5" in caplog.text
    assert_same(sd, before)


@pytest.mark.parametrize("offload", ["enable_sequential_cpu_offload", "enable_model_cpu_offload"])
def test_offloaded_text_encoders(sd, offload):
    before, width = state(sd), sd.text_encoder.config.hidden_size
    getattr(sd, offload)(device="cpu")
    vectors = torch.randn(2, width)
    sd.load_lora_weights({**adapter_of(sd), "bundle_emb.mytok.emb_params": vectors}, adapter_name="a")
    hooks = {name for name, part in sd.text_encoder.named_modules() if hasattr(part, "_hf_hook")}
    sd.delete_adapters("a")
    assert {name for name, part in sd.text_encoder.named_modules() if hasattr(part, "_hf_hook")} <= hooks
    sd.remove_all_hooks()
    assert_same(sd, before)


def test_saved_again_from_the_pipeline(sd, tmp_path):
    vectors = torch.randn(2, sd.text_encoder.config.hidden_size)
    sd.load_lora_weights({**adapter_of(sd), "bundle_emb.mytok.emb_params": vectors}, adapter_name="a")
    again = Adapter.load(Adapter.from_pipeline(sd, "a").save(tmp_path / "a.safetensors"))
    assert torch.equal(again.embeddings["mytok.emb_params"], vectors)


def test_a_copy_of_the_pipeline(sd):
    """It has the embeddings, too, and loses them by itself."""
    before, vectors = state(sd), torch.randn(2, sd.text_encoder.config.hidden_size)
    sd.load_lora_weights({**adapter_of(sd), "bundle_emb.mytok.emb_params": vectors}, adapter_name="a")
    twin = type(sd)(**copy.deepcopy(sd.components), requires_safety_checker=False)
    wanted = encoded(sd, "a mytok")[0]
    assert torch.equal(encoded(twin, "a mytok")[0], wanted)
    twin.delete_adapters("a")
    assert_same(twin, before)
    assert torch.equal(encoded(sd, "a mytok")[0], wanted)
