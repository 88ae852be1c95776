"""DyLoRA's arithmetic and its dial."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

from lora_adapters import (
    Adapter,
    AdapterError,
    C3LierConfig,
    DyLoraConfig,
    LierLaConfig,
    add_adapter,
    set_rank,
    set_step,
)
from lora_adapters.types.dylora.rank_controller import controllers
from lora_adapters.types.layers import layers
from tests.lora_adapters.conftest import expected
from tests.lora_adapters.golden_outputs import error, outputs


def trained(pipe, **options):
    """The pipeline with a DyLoRA whose `up` matrices are not zero."""
    config = DyLoraConfig(**{"r": 8, "lora_alpha": 4, "conv_dim": 4, "conv_alpha": 2, "unit": 2, **options})
    torch.manual_seed(0)
    for model in (pipe.unet, pipe.text_encoder):
        add_adapter(model, config, "a")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return pipe


def gradients(pipe, step):
    golden = expected("sd15")
    pipe.unet.zero_grad()
    set_step([pipe.unet], step)
    pipe.unet(golden["latents"], 7, golden["context"]).sample.square().mean().backward()
    return {name: p.grad.clone() for name, p in pipe.unet.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scaling", ["constant", "rank", "sqrt"])
def test_set_rank_equals_the_cut_adapter(scaling, pipeline, tmp_path):
    golden = expected("sd15")
    base = outputs(pipeline(), golden)
    pipe = trained(pipeline(), rank_scaling=scaling)
    for model in (pipe.unet, pipe.text_encoder):
        model.eval()
    for rank in (2, 6, 8):
        set_rank(pipe, rank)
        cut = Adapter.from_pipeline(pipe, "a")
        cut = cut.truncate(rank) if rank < 8 else cut
        other = pipeline()
        other.load_lora_weights(cut.save(tmp_path / f"{rank}.safetensors"))
        assert error(outputs(pipe, golden), outputs(other, golden), base) < 1e-4


@pytest.mark.parametrize("sampling", ["uniform", "spread"])
def test_ranks_are_the_same_in_the_whole_model_and_every_process(sampling, pipeline):
    pipe, golden = trained(pipeline(), rank_sampling=sampling), expected("sd15")
    models = [pipe.unet.train(), pipe.text_encoder.train()]
    drawn = []
    for step in range(16):
        set_step(models, step, seed=3)
        pipe.text_encoder(golden["input_ids"])
        pipe.unet(golden["latents"], 7, golden["context"])
        (ranks,) = {tuple(dial.now) for dial in controllers(models)}
        drawn.append(ranks)
    count = len(golden["latents"])
    assert {len(ranks) for ranks in drawn} == ({1} if sampling == "uniform" else {count})
    assert {rank for ranks in drawn for rank in ranks} == {2, 4, 6, 8}
    for step in (3, 7):  # another process, which has the batch's last sample only
        again = copy.deepcopy(pipe.unet)
        set_step([again], step, 3, samples=range(count - 1, count), total=count)
        again(golden["latents"][-1:], 7, golden["context"][-1:])
        assert controllers(again)[0].now == [drawn[step][-1]]


def test_the_weight_of_an_adapter_counts_at_every_rank(pipeline):
    golden = expected("sd15")
    pipe = trained(pipeline())
    for model in (pipe.unet, pipe.text_encoder):
        model.eval()
    pipe.set_adapters(["a"], 0.6)
    for rank in (8, 4):
        set_rank(pipe, rank)
        found = outputs(pipe, golden)
        other = pipeline()
        cut = Adapter.from_pipeline(pipe, "a")
        (cut.truncate(rank) if rank < 8 else cut).scale(0.6).to_pipeline(other, "b")
        assert error(found, outputs(other, golden), outputs(pipeline(), golden)) < 1e-4


@pytest.mark.parametrize("kind", ["unet", "text_encoder"])
def test_each_sample_is_computed_at_its_own_rank(kind, pipeline):
    """A batch at its samples' ranks is what these samples are when each is alone, with its rank set."""
    pipe, golden = trained(pipeline()), expected("sd15")
    model = getattr(pipe, kind)

    def called(rows):
        if kind == "unet":
            return model(golden["latents"][rows], 7, golden["context"][rows]).sample
        return model(golden["input_ids"][rows]).last_hidden_state

    model.train()
    ranks = set()
    for step in range(4):
        set_step(model, step)
        together = called(slice(None)).detach()
        now = controllers(model)[0].now
        ranks.add(tuple(now))
        for row, rank in enumerate(now):
            model.eval()
            set_rank(model, rank)
            torch.testing.assert_close(called(slice(row, row + 1))[0], together[row], rtol=1e-4, atol=1e-5)
            model.train()
    assert any(len(set(now)) > 1 for now in ranks)


def test_windows_of_a_caption_have_its_rank(pipeline):
    model = trained(pipeline()).text_encoder.train()
    set_step(model, 2, samples=range(2))
    model(expected("sd15")["input_ids"][:1].repeat(6, 1))
    now = controllers(model)[0].now
    assert now == [now[0]] * 3 + [now[3]] * 3
    set_step(model, 2, samples=range(4))
    with pytest.raises(AdapterError, match="a batch of 6, but set_step was called for 4 samples"):
        model(expected("sd15")["input_ids"][:1].repeat(6, 1))


def test_a_model_whose_samples_do_not_come_first_needs_one_rank_for_all():
    class Turned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x):  # (batch, length, 4), as transformers without batch_first see it
            return self.linear(x.transpose(0, 1)).transpose(0, 1)

    def model(**options):
        return inject_adapter_in_model(DyLoraConfig(r=4, target_modules=["linear"], **options), Turned()).train()

    with pytest.raises(AdapterError, match=r"got the shape \[5, 3, 4\] in a batch of 3.*rank_sampling='uniform'"):
        model()(torch.ones(3, 5, 4))
    assert model(rank_sampling="uniform")(torch.ones(3, 5, 4)).shape == (3, 5, 4)


def test_gradients_are_the_same_with_checkpointing_and_stop_at_the_rank(pipeline):
    pipe = trained(pipeline())
    pipe.unet.train()
    for step in range(4):
        pipe.unet.disable_gradient_checkpointing()
        plain = gradients(pipe, step)
        pipe.unet.enable_gradient_checkpointing()
        again = gradients(pipe, step)
        assert plain.keys() == again.keys()
        assert all(torch.equal(plain[name], again[name]) for name in plain)
        rank = max(controllers(pipe.unet)[0].now)
        for name, gradient in plain.items():
            part = gradient[rank:] if "lora_A" in name else gradient[:, rank:]
            assert not part.any()


def test_freeze_lower_trains_the_last_unit_only(pipeline):
    pipe = trained(pipeline(), freeze_lower=True, conv_dim=8)
    pipe.unet.train()
    for step in range(4):
        found = gradients(pipe, step)
        (rank,) = controllers(pipe.unet)[0].now
        for name, gradient in found.items():
            rows = gradient if "lora_A" in name else gradient.transpose(0, 1)
            assert not rows[: rank - 2].any()
            assert not rows[rank:].any()
            assert rows[rank - 2 : rank].any() or "attn2" in name


def test_configs_check_their_fields():
    for options, said in (
        ({"r": 8, "unit": 3}, "unit 3 does not divide r 8"),
        ({"r": 8, "unit": 0}, "unit is 0"),
        ({"r": 8, "conv_dim": 6, "unit": 4}, "unit 4 does not divide conv_dim 6"),
        ({"rank_scaling": "none"}, "rank_scaling is 'none'"),
        ({"rank_sampling": "often"}, "rank_sampling is 'often': it must be one of uniform, spread"),
        ({"r": 0}, "r is 0"),
        ({"lora_bias": True}, "lora_bias is not supported: no biases"),
    ):
        with pytest.raises(AdapterError, match=said):
            DyLoraConfig(**options)


def test_block_lists_are_checked_and_zero_skips(pipeline):
    unet = pipeline().unet
    with pytest.raises(AdapterError, match=r"block_dims has 24 values, SD1\.x and SD2\.x has 25"):
        unet.add_adapter(LierLaConfig(block_dims=[4] * 24), "short")
    unet.add_adapter(C3LierConfig(block_dims=[0] * 12 + [3] + [1] * 12, conv_block_dims=[0] * 24 + [2]), "blocks")
    ranks = {module.path: one.rank for module, one in Adapter.from_models({"unet": unet}, "blocks").modules.items()}
    assert {rank for path, rank in ranks.items() if path.startswith("mid_block.attentions")} == {3}
    assert not [path for path in ranks if path.startswith("down_blocks")]
    assert {rank for path, rank in ranks.items() if path.endswith((".conv1", ".conv2"))} == {2}


@pytest.mark.parametrize("kind", [LierLaConfig, C3LierConfig, DyLoraConfig])
@pytest.mark.parametrize("key", ["1", "^1$", r"inner\.1", ".*1"])
def test_patterns_are_honoured_as_lora_config_does(kind, key):
    def placed(config):
        model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
        model.inner = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
        model = inject_adapter_in_model(config, model)
        return model, {path: (one.r["default"], one.scaling["default"]) for path, one in layers(model, "default")}

    options = {"r": 4, "lora_alpha": 2, "target_modules": ["0", "1"], "rank_pattern": {key: 8}}
    options["alpha_pattern"] = {key: 3}
    model, found = placed(kind(**options))
    assert found == placed(LoraConfig(**options))[1]
    assert (8, 3 / 8) in found.values()
    again = model.peft_config["default"]
    assert again.resolved
    assert placed(again)[1] == found  # the ranks that were found are what another model gets


def test_patterns_win_over_blocks_in_a_unet(pipeline):
    unet = pipeline().unet
    blocks = {"block_dims": [2] * 25, "block_alphas": [5.0] * 25}
    unet.add_adapter(LierLaConfig(**blocks, rank_pattern={"to_q": 3}, alpha_pattern={"to_k": 7}))
    modules = Adapter.from_models({"unet": unet}).modules
    for module, one in modules.items():
        wanted = (3 if module.path.endswith("to_q") else 2, 7 if module.path.endswith("to_k") else 5)
        assert (one.rank, one.alpha) == wanted


@pytest.mark.parametrize("first", [False, True], ids=["beside another", "alone"])
@pytest.mark.parametrize("kind", [LierLaConfig, DyLoraConfig])
def test_a_config_that_leaves_no_module_leaves_its_name_free(kind, first, pipeline):
    unet = pipeline().unet
    if not first:
        unet.add_adapter(LierLaConfig(r=2), "other")
    was = {name: one.requires_grad for name, one in unet.named_parameters()}
    with pytest.raises(AdapterError, match=r"^adapter mine would have no effect: no module has a rank above 0$"):
        unet.add_adapter(kind(block_dims=[0] * 25), "mine")
    assert {name: one.requires_grad for name, one in unet.named_parameters()} == was
    assert first or unet.active_adapters() == ["other"]
    unet.add_adapter(kind(r=2), "mine")
    assert {one.rank for one in Adapter.from_models({"unet": unet}, "mine").modules.values()} == {2}


def test_peft_s_models_are_as_they_were_after_a_failure(pipeline):
    model = get_peft_model(pipeline().unet, LierLaConfig(r=2))
    with pytest.raises(AdapterError, match="no module has a rank above 0"):
        model.add_adapter("mine", LierLaConfig(block_dims=[0] * 25))
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("first", [False, True], ids=["beside another", "alone"])
def test_a_failure_half_way_leaves_no_layer_behind(first):
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 5), torch.nn.Embedding(5, 2))
    if not first:
        model = inject_adapter_in_model(LierLaConfig(r=2, target_modules=["0"]), model, "other")
    was = list(model)
    with pytest.raises(AdapterError, match="2 is Embedding"):
        inject_adapter_in_model(DyLoraConfig(r=2, target_modules=["0", "1", "2"]), model, "mine")
    assert all(now is one for now, one in zip(model, was, strict=True))
    assert list(layers(model, "mine")) == []
    assert first or model[0].active_adapters == ["other"]
    model = inject_adapter_in_model(DyLoraConfig(r=2, target_modules=["0", "1"]), model, "mine")
    assert {name for name, one in model.named_parameters() if one.requires_grad and "lora_" not in name} == set()


FULL_UNETS = {
    "sd15": ({"cross_attention_dim": 768, "attention_head_dim": 8}, 192, 278),
    "sd21": (
        {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
        192,
        278,
    ),
    "sdxl": (
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        722,
        788,
    ),
}


@pytest.mark.parametrize("name", FULL_UNETS)
def test_coverage_of_full_size_unets(name):
    from accelerate import init_empty_weights

    from lora_adapters.target_modules import covered

    options, lierla, c3lier = FULL_UNETS[name]
    with init_empty_weights():
        unet = UNet2DConditionModel(**options)
    assert len(covered(unet, conv=False)) == lierla
    assert len(covered(unet, conv=True)) == c3lier
