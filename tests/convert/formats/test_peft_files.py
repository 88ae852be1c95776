"""PEFT's tensors in one file: read where they or the metadata say everything, else one line says what is missing."""

import json
from math import sqrt

import pytest
import torch

from lora_adapters.convert import Adapter, AdapterError, ModuleName

PATH = "mid_block.attentions.0.proj_in"
UNET = ModuleName("unet", PATH)
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
UPPER, WEIGHT = torch.randn(2, 3), torch.randn(4, 6)
BUTTERFLY = {"boft_R": torch.randn(1, 2, 3, 3), "boft_s": torch.rand(4, 1)}


def series(upper):
    """OneTrainer's rotations: I + 2Q + 2Q² + 2Q³ + Q⁴."""
    rotations = []
    for a, b, c in upper.tolist():
        skew = torch.tensor([[0, a, b], [-a, 0, c], [-b, -c, 0]])
        powers = [torch.linalg.matrix_power(skew, n) for n in range(5)]
        rotations.append(powers[0] + 2 * sum(powers[1:4]) + powers[4])
    return torch.block_diag(*rotations)


@pytest.mark.parametrize("end", ["{}", "{}.default"])
@pytest.mark.parametrize("start", ["base_model.model.", "unet.base_model.model.", "unet.", "diffusion_model.", ""])
def test_boft_says_everything(start, end):
    tensors = {f"{start}{PATH}.{end.format(name)}": tensor for name, tensor in BUTTERFLY.items()}
    adapter = Adapter.from_tensors(tensors)
    assert (adapter.kinds, list(adapter.modules)) == ({"BOFT": 1}, [UNET])


@pytest.mark.parametrize("count", [256, 160])
def test_the_width_tells_which_text_encoder(count):
    """768 = 256 · 3, and 1280 = 160 · 8."""
    size = {256: 3, 160: 8}[count]
    tensors = {"boft_R": torch.zeros(1, count, size, size), "boft_s": torch.ones(count * size, 1)}
    adapter = Adapter.from_tensors({f"base_model.model.{TEXT}.{name}": tensor for name, tensor in tensors.items()})
    assert adapter.components == ({256: "text_encoder", 160: "text_encoder_2"}[count],)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("name", "metadata"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in", {}),
        (f"diffusion_model.{PATH}", {}),
        (f"unet.{PATH}", {"ot_branch": "master"}),
    ],
)
def test_onetrainers_series(name, metadata, scaled, tmp_path):
    """A convolution's weight is turned by R, with its kernel; what a linear layer reads is, so its weight by Rᵀ."""
    mark = {f"{name}.oft_R.scaled_oft": torch.tensor(True)} if scaled else {}
    adapter = Adapter.from_tensors({f"{name}.oft_R.weight": UPPER, **mark}, metadata)
    turns = series(UPPER / (2 * sqrt(2)) if scaled else UPPER)
    kernels = torch.randn(4, 3, 2, 1)
    for read in (adapter, Adapter.load(adapter.save(tmp_path / "again.safetensors"))):
        change = read.modules[UNET]
        torch.testing.assert_close(WEIGHT + change.delta(WEIGHT), WEIGHT @ turns.T, rtol=1e-5, atol=1e-5)
        flat = (kernels + change.delta(kernels)).flatten(1)
        torch.testing.assert_close(flat, kernels.flatten(1) @ turns, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entry", ["lora_adapter_metadata", "peft_config"])
@pytest.mark.parametrize("prefix", ["", "unet."])
@pytest.mark.parametrize("start", ["unet.", "base_model.model."])
def test_a_config_in_the_metadata_says_how_it_rotates(start, prefix, entry):
    config = {"peft_type": "OFT", "use_cayley_neumann": False, "peft_version": "0.21.2"}
    metadata = {entry: json.dumps({f"{prefix}{key}": value for key, value in config.items()})}
    change = Adapter.from_tensors({f"{start}{PATH}.oft_R.weight": UPPER}, metadata).modules[UNET]
    turned = WEIGHT + change.delta(WEIGHT)
    torch.testing.assert_close(turned.norm(dim=1), WEIGHT.norm(dim=1))  # exact rotations


@pytest.mark.parametrize("start", ["unet.", "base_model.model."])
def test_a_config_in_the_metadata_says_the_scale(start):
    factors = {"hada_w1_a": (4, 2), "hada_w1_b": (2, 6), "hada_w2_a": (4, 2), "hada_w2_b": (2, 6)}
    loha = {f"{start}{PATH}.{name}": torch.randn(*shape) for name, shape in factors.items()}
    pair = {f"{start}{PATH}.lora_A.weight": torch.randn(2, 6), f"{start}{PATH}.lora_B.weight": torch.randn(4, 2)}
    for tensors, config in (
        (loha, {"peft_type": "LOHA", "r": 2, "alpha": 7}),
        (pair, {"peft_type": "LORA", "r": 2, "lora_alpha": 7}),
    ):
        first, second, *rest = tensors.values()
        want = 3.5 * (first @ second * (rest[0] @ rest[1]) if rest else second @ first)
        adapter = Adapter.from_tensors(tensors, {"lora_adapter_metadata": json.dumps(config)})
        torch.testing.assert_close(adapter.modules[UNET].delta(), want)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"base_model.model.{PATH}.oft_R.weight": UPPER}, r"which says how it rotates \(use_cayley_neumann"),
        ({f"unet.{PATH}.oft_R.default.weight": UPPER}, "does not say how it rotates .* use a folder with"),
        ({"transformer.transformer_blocks.0.attn.to_q.oft_R.weight": UPPER}, "does not say how it rotates"),
        ({f"base_model.model.{PATH}.lora_A.default.weight": UPPER}, r"which says the scale \(r and alpha\): put it"),
        ({f"base_model.model.{PATH}.hada_w1_a": UPPER}, r"which says the scale \(r and alpha\): put it beside them"),
        ({f"unet.{PATH}.oft_R.weight": UPPER, f"unet.{PATH}.oft_R.clipped_oft": UPPER}, "an OFT adapter"),
    ],
)
def test_one_line_says_what_is_missing(tensors, said):
    with pytest.raises(AdapterError, match=said) as caught:
        Adapter.from_tensors(tensors)
    assert "\n" not in str(caught.value)


def test_an_adapter_that_was_begun_from_the_base_is_refused_in_a_file_too():
    pair = {f"unet.{PATH}.lora_A.weight": torch.ones(1, 2), f"unet.{PATH}.lora_B.weight": torch.ones(2, 1)}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 1, "unet.init_lora_weights": "pissa_niter_4"})}
    with pytest.raises(AdapterError, match="pissa_niter_4 is not supported: it changes the base weights too"):
        Adapter.from_tensors(pair, metadata)


def test_kohyas_oft():
    """networks.oft has a prefix of its own; its alpha limits the rotations."""
    blocks = {"oft_blocks": torch.randn(2, 2, 2), "alpha": torch.tensor(0.01)}
    for prefix, rest in (("oft_unet_", "mid_block_attentions_0_proj_in"), ("oft_unet_", "middle_block_1_proj_in")):
        adapter = Adapter.from_tensors({f"{prefix}{rest}.{name}": tensor for name, tensor in blocks.items()})
        change = adapter.modules[UNET]
        assert (change.kind, change.constraint) == ("OFT", pytest.approx(0.01))
