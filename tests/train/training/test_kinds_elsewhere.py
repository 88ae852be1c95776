"""Files of every kind that is trained, read without this package: by arithmetic, by LyCORIS, by PEFT."""

import copy
import logging
import math

import peft
import pytest
import torch
from safetensors.torch import load_file

from lora_adapters.convert import Adapter
from lora_adapters.train.models.base import load_base_models
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.loop import train

LYCORIS = {"network_module": "lycoris.kohya", "network_dim": 4}
LINEAR = {"preset": "attn-mlp"}
KINDS = {
    "LoRA": {"network_module": "networks.lora", "network_args": {"conv_dim": 2}},
    "LoHa": {"network_module": "networks.loha", "network_args": {"conv_dim": 2}},
    "LoKr": {"network_module": "networks.lokr", "network_args": {"conv_dim": 2, "factor": 4}},
    "LoCon, rsLoRA": {**LYCORIS, "network_args": {"conv_dim": 2, "conv_alpha": 3, "rs_lora": True}},
    "LoCon, Tucker, scalar": {**LYCORIS, "network_args": {"use_tucker": True, "use_scalar": True}},
    "LoHa, Tucker, scalar": {**LYCORIS, "network_args": {"algo": "loha", "use_tucker": True, "use_scalar": True}},
    "LoHa, DoRA of inputs": {**LYCORIS, "network_args": {"algo": "loha", "dora_wd": True, "wd_on_output": False}},
    "LoHa, of linear layers": {**LYCORIS, "network_alpha": 3, "network_args": {"algo": "loha", **LINEAR}},
    "LoKr, Tucker": {**LYCORIS, "network_dim": 2, "network_args": {"algo": "lokr", "use_tucker": True}},
    "LoKr, both": {
        **LYCORIS, "network_dim": 1, "network_args": {"algo": "lokr", "decompose_both": True, "rs_lora": True},
    },
    "LoKr, full, unbalanced": {
        **LYCORIS,
        "network_args": {"algo": "lokr", "full_matrix": True, "unbalanced_factorization": True, "factor": 4},
    },
    "LoKr, of linear layers": {**LYCORIS, "network_dim": 1, "network_args": {"algo": "lokr", **LINEAR}},
    "DoRA": {**LYCORIS, "network_args": {"dora_wd": True, "train_norm": True}},
    "DoRA, of linear layers": {**LYCORIS, "network_alpha": 3, "network_args": {"dora_wd": True, **LINEAR}},
    "full": {**LYCORIS, "network_args": {"algo": "full", "train_norm": True}},
    "GLoRA": {**LYCORIS, "network_args": {"algo": "glora", "use_scalar": True}},
    "IA3": {**LYCORIS, "network_args": {"algo": "ia3"}},
    "OFT": {**LYCORIS, "network_args": {"algo": "diag-oft", "rescaled": True}},
    "BOFT": {**LYCORIS, "network_args": {"algo": "boft", "rescaled": True, **LINEAR}},
}  # fmt: skip
# LyCORIS has no reader for IA3, and takes the differences of full for whole weights. Its reader fails on what its own
# modules write of the other three: it takes magnitudes for those of outputs, and rank and factors for those of w1.
NOT_READ_BY_LYCORIS = ("IA3", "full", "LoHa, DoRA of inputs", "LoKr, Tucker", "LoKr, full, unbalanced")
VARIANTS = [kind for kind in KINDS if "," in kind and "of linear layers" not in kind]


def params(kinds):
    """These kinds; only the main ones where slow tests are left out."""
    return [pytest.param(kind, marks=pytest.mark.slow if kind in VARIANTS else ()) for kind in kinds]


@torch.no_grad()
def outputs(unet, text_encoder):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, unet.config.in_channels, 8, 8, generator=generator)
    text = text_encoder.eval()(torch.arange(9)[None])[0]
    return [text, unet.eval()(latents, 7, text).sample]


def check(found, wanted, before):
    """Each output as far from what is wanted as rounding, in units of what the adapter changes."""
    for got, expected, base in zip(found, wanted, before, strict=True):
        change = float((expected - base).norm())
        assert change > 1e-3 * float(base.norm())
        assert float((got - expected).norm()) < 1e-4 * change


@pytest.fixture(scope="module")
def trained(sd1, images, tmp_path_factory):
    """The file of a kind after two steps, copies of the base models, their outputs, and those with the adapter."""
    made = {}

    def of(kind):
        if kind not in made:
            run = settings(
                pretrained_model_name_or_path=str(sd1), train_data_dir=str(images), caption_extension=".txt",
                resolution="64", output_dir=str(tmp_path_factory.mktemp("out")), output_name="x", train_batch_size=2,
                max_train_steps=2, no_report=True, learning_rate=0.02, max_data_loader_n_workers=0, seed=7,
                **{"network_dim": 2, "network_alpha": 2, **KINDS[kind]},
            )  # fmt: skip
            models = train(run).models
            base = load_base_models(run)
            plain = base.denoiser, base.text_encoders[0]
            live = outputs(models.denoiser, models.text_encoders[0])
            made[kind] = f"{run.output_dir}/x.safetensors", plain, outputs(*plain), live
        file, plain, before, live = made[kind]
        return file, copy.deepcopy(plain), before, live

    return of


# --- by arithmetic ----------------------------------------------------------------------------------------------------


def product(t, weight):
    """ΔW of LoRA, LoHa or LoKr, flattened, without a scale; and the rank, None where there is none."""
    if "lora_up.weight" in t:
        up, down, mid = t["lora_up.weight"].flatten(1), t["lora_down.weight"].flatten(1), t.get("lora_mid.weight")
        if mid is not None:
            down = torch.einsum("rshw,si->rihw", mid, down).flatten(1)
        return up @ down, len(t["lora_down.weight"])
    if "hada_w1_a" in t:
        parts = []
        for w in ("1", "2"):
            a, b, core = t[f"hada_w{w}_a"], t[f"hada_w{w}_b"], t.get(f"hada_t{w}")
            parts.append(a @ b if core is None else torch.einsum("rshw,ro,si->oihw", core, a, b).flatten(1))
        return parts[0] * parts[1], len(t["hada_w1_b"])
    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_t2" in t:
        second = torch.einsum("rshw,ro,si->oihw", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    elif "lokr_w2" in t:
        second = t["lokr_w2"]
    else:
        second = t["lokr_w2_a"] @ t["lokr_w2_b"]
    kernel = weight.shape[2:]
    second = second.reshape(len(second), -1, math.prod(kernel))
    whole = torch.stack([torch.kron(first, second[..., k]) for k in range(second.shape[2])], 2)
    low = next((t[key] for key in ("lokr_w2_b", "lokr_w1_b") if key in t), None)
    return whole.flatten(1), None if low is None else len(low)


def rotation(blocks):
    """(I + Q)(I - Q)⁻¹ of each block, Q = B - Bᵀ."""
    skew = blocks - blocks.mT
    unit = torch.eye(skew.shape[-1])
    return (unit + skew) @ torch.linalg.inv(unit - skew)


def rotated(blocks, matrix):
    if blocks.ndim == 3:
        return torch.block_diag(*rotation(blocks)).T @ matrix
    for stage, turn in enumerate(rotation(blocks)):
        size, columns = 2**stage * (turn.shape[-1] // 2), matrix.shape[1]
        mixed = matrix.reshape(-1, 2, size, columns).transpose(1, 2).reshape(len(turn), turn.shape[-1], columns)
        matrix = (turn @ mixed).reshape(-1, size, 2, columns).transpose(1, 2).reshape(-1, columns)
    return matrix


def new_weight(t, weight):
    """The weight with the change of a module's tensors `t`."""
    matrix = weight.flatten(1) if weight.ndim > 1 else weight
    if "diff" in t or "w_norm" in t:
        return weight + t.get("diff", t.get("w_norm"))
    if "on_input" in t:
        axis = 1 if t["on_input"] else 0
        return weight * (1 + t["weight"].reshape([-1 if n == axis else 1 for n in range(weight.ndim)]))
    if "oft_blocks" in t:
        return (rotated(t["oft_blocks"], matrix) * t["rescale"].reshape(-1, 1)).reshape(weight.shape)
    if "a1.weight" in t:
        a1, a2, b1, b2 = (t[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
        scale = float(t["alpha"]) / a2.shape[0]
        own = torch.einsum("oi...,ij->oj...", weight, a1 @ a2).reshape(matrix.shape)
        return (matrix + scale * (own + (b1 @ b2))).reshape(weight.shape)
    change, rank = product(t, weight)
    total = weight + (change if rank is None else change * (float(t["alpha"]) / rank)).reshape(weight.shape)
    if "dora_scale" in t:
        kept = 0 if len(t["dora_scale"]) == len(weight) and t["dora_scale"].numel() == len(weight) else 1
        axes = [axis for axis in range(weight.ndim) if axis != kept]
        total = total * (t["dora_scale"].reshape([-1 if n == kept else 1 for n in range(weight.ndim)])
                         / torch.linalg.vector_norm(total, dim=axes, keepdim=True))  # fmt: skip
    return total


def modules_in(file, unet, text_encoder):
    """The layers with kohya's names that a file has, and their tensors."""
    groups = {}
    for key, tensor in load_file(file).items():
        name, _, end = key.partition(".")
        groups.setdefault(name, {})[end] = tensor
    text = "lora_te_" if hasattr(text_encoder, "text_model") else "lora_te_text_model_"
    layers = {f"lora_unet_{path.replace('.', '_')}": layer for path, layer in unet.named_modules()}
    layers |= {f"{text}{path.replace('.', '_')}": layer for path, layer in text_encoder.named_modules()}
    return [(layers[name], tensors) for name, tensors in groups.items()]


@pytest.mark.parametrize("kind", params(KINDS))
def test_arithmetic_on_the_files_tensors_gives_what_was_trained(trained, kind) -> None:
    file, models, before, live = trained(kind)
    with torch.no_grad():
        for layer, tensors in modules_in(file, *models):
            layer.weight.copy_(new_weight(tensors, layer.weight))
            if (bias := tensors.get("diff_b", tensors.get("b_norm"))) is not None:
                layer.bias.add_(bias)
    check(outputs(*models), live, before)


# --- by LyCORIS -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", params(kind for kind in KINDS if kind not in NOT_READ_BY_LYCORIS))
def test_lycoris_reads_what_was_trained(trained, kind) -> None:
    kohya = pytest.importorskip("lycoris.kohya")
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    file, (unet, text_encoder), before, live = trained(kind)
    weights = load_file(file)
    if not hasattr(text_encoder, "text_model"):  # transformers 5, whose names LyCORIS looks for
        weights = {key.replace("lora_te_text_model_", "lora_te_"): tensor for key, tensor in weights.items()}
    # what it would train of the models, before it looks at the file: with all classes, a U-Net of diffusers fails
    kohya.LycorisNetworkKohya.apply_preset({"unet_target_module": ["Transformer2DModel"], "unet_target_name": []})
    network, _ = kohya.create_network_from_weights(1.0, file, None, text_encoder, unet, weights_sd=weights)
    network.apply_to(text_encoder, unet, True, True)
    assert not network.load_state_dict(weights, strict=False).missing_keys
    assert len(network.unet_loras) + len(network.text_encoder_loras) == len({key.split(".")[0] for key in weights})
    network.eval()
    check(outputs(unet, text_encoder), live, before)


# --- by PEFT ----------------------------------------------------------------------------------------------------------


def peft_config(kind, groups):
    """PEFT's config of these modules, and the names of the tensors there."""
    names = [*groups]
    if "IA3" in kind:
        inputs = [name for name, tensors in groups.items() if tensors["on_input"]]
        return peft.IA3Config(target_modules=names, feedforward_modules=inputs)
    if "LoHa" in kind:
        return peft.LoHaConfig(r=4, alpha=3, target_modules=names)
    return peft.LoKrConfig(r=1, alpha=2, target_modules=names)


@pytest.mark.parametrize("kind", ["LoHa, of linear layers", "LoKr, of linear layers", "IA3"])
def test_peft_computes_the_same_with_the_tensors(trained, kind) -> None:
    """Of the U-Net: PEFT's IA3 would scale biases, too, which the text encoder's layers have."""
    file, (unet, _), _, live = trained(kind)
    groups, paths = {}, {f"lora_unet_{path.replace('.', '_')}": path for path, _ in unet.named_modules()}
    for key, tensor in load_file(file).items():
        name, _, end = key.partition(".")
        if name in paths:
            groups.setdefault(paths[name], {})[end] = tensor
    model = peft.get_peft_model(copy.deepcopy(unet), peft_config(kind, groups))
    state = {}
    for path, tensors in groups.items():
        for end, tensor in tensors.items():
            if "IA3" in kind and end == "weight":
                state[f"base_model.model.{path}.ia3_l"] = 1 + (tensor[None] if tensors["on_input"] else tensor[:, None])
            elif end.startswith(("hada_", "lokr_")):
                state[f"base_model.model.{path}.{end}"] = tensor
    assert not peft.set_peft_model_state_dict(model, state).unexpected_keys
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, unet.config.in_channels, 8, 8, generator=generator), live[0]
    with torch.no_grad():
        found, base = model.eval()(latents, 7, text).sample, unet.eval()(latents, 7, text).sample
    check([found], live[1:], [base])


@pytest.mark.parametrize("kind", params(["LoRA", "LoCon, rsLoRA"]))
def test_peft_reads_the_folder_that_convert_writes(trained, kind, tmp_path) -> None:
    file, (unet, text_encoder), before, live = trained(kind)
    folder = Adapter.load(file).save(tmp_path / "folder", format="peft")
    models = [
        peft.PeftModel.from_pretrained(model, folder, subfolder=name)
        for model, name in ((unet, "unet"), (text_encoder, "text_encoder"))
    ]
    check(outputs(*models), live, before)
