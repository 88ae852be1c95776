"""What --dry_run says of captions and memory is what training does."""

from collections import Counter

import pytest
import torch

from lora_adapters import Adapter
from lora_adapters.convert.tools.block_weights import block_name
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.activations import activation_bytes
from lora_adapters.train.training.block_table import blocks
from lora_adapters.train.training.dry_run import captions, memory, report
from lora_adapters.train.training.module_choices import choices
from lora_adapters.train.training.optimizers import state_bytes
from lora_adapters.train.training.setup import prepare

VALUES = {"AdamW": 8, "torch.optim.SGD": 0, "SGDNesterov": 4, "Lion": 4, "AdaFactor": None}


@pytest.mark.parametrize("optimizer", VALUES)
def test_the_optimizer_s_memory_is_measured(basics, optimizer) -> None:
    if optimizer == "Lion":
        pytest.importorskip("lion_pytorch")
    options = settings(**{**basics, "optimizer_type": optimizer, "max_train_steps": 1})
    run = prepare(options)
    said = memory(run)[f"optimizer ({optimizer})"]
    batch = next(run.data.batches(0))
    run.loss.training(batch).backward()
    run.optimizer.step()
    kept = sum(
        value.numel() * value.element_size()
        for state in run.optimizer.state.values()
        for value in state.values()
        if hasattr(value, "numel")
    )
    assert said == kept
    if VALUES[optimizer] is not None:
        numbers = sum(parameter.numel() for parameter in run.parameters)
        assert VALUES[optimizer] == kept // numbers


def test_an_optimizer_that_does_not_run_here(basics, monkeypatch) -> None:
    def needs_a_gpu(self, closure=None):
        raise RuntimeError("needs a GPU")

    run = prepare(settings(**basics))
    monkeypatch.setattr("torch.optim.AdamW.step", needs_a_gpu)
    assert state_bytes(run.settings, run.parameters) is None


def test_captions_are_those_of_the_first_epoch(basics, images) -> None:
    options = {**basics, "shuffle_caption": True, "caption_tag_dropout_rate": 0.3}
    for file in (images / "1_shape").glob("*.txt"):
        assert file.read_text()
    run = prepare(settings(**options))
    seen = [caption for batch in run.data.batches(0) for caption in batch.captions]
    shown = captions(run)
    assert [name.rpartition("/")[2] for name, _ in shown] == ["00.png", "01.png", "02.png"]
    assert all(caption in seen for _, caption in shown)


def test_what_patterns_chose_is_shown(basics, caplog) -> None:
    args = ["preset=unet-transformer-only", "exclude_patterns=['.*attn2.*']", "network_reg_dims=.*attn1.*=3,x=1"]
    options = {**basics, "network_args": [*args, "network_reg_lrs=.*ff.*=0.5", "verbose=True"], "dry_run": True}
    run = prepare(settings(**options))
    assert list(run.trained) == ["unet"]
    lines = choices(run)
    assert lines[:8] == [
        "chosen by preset unet-transformer-only",
        "exclude_patterns:",
        "  .*attn2.*: 64 modules left out",
        "network_reg_dims:",
        "  .*attn1.*: 64 modules, rank 3",
        "  x: 0 modules, rank 1",
        "network_reg_lrs:",
        "  .*ff.*: 32 modules, learning rate 0.5",
    ]
    assert lines[8] == "modules:"
    assert len(lines) == 9 + 16 * 8
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    assert f"  {path}.attn1.to_q: LoRA, rank 3, alpha 1" in lines
    assert f"  {path}.ff.net.2: LoRA, rank 2, alpha 1" in lines
    assert "network_reg_dims: x matches no module" in caplog.text
    assert "0.5" in blocks(run)["IN01"].rates


@pytest.mark.parametrize("options", [{}, {"network_train_unet_only": True, "mem_eff_attn": True}])
def test_activations_are_what_autograd_keeps(basics, options) -> None:
    """Counted on shapes alone, against a real step; the CPU's attention keeps what the fused kernels of GPUs keep."""
    run = prepare(settings(**basics, **options, dry_run=True))
    said = activation_bytes(run)
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in run.plain.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage())
        return tensor

    run.training_mode()
    batch = next(run.data.batches(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = run.loss.training(batch)
    measured = sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
    assert loss.requires_grad
    assert said == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("part", [{}, {"network_train_unet_only": True}])
def test_activations_of_a_dylora_whose_components_are_to_be_sorted(basics, part) -> None:
    """Before and after the sorting a step keeps the same, and the estimate leaves the training as it was."""
    options = {**basics, **part, "network_module": "networks.dylora", "max_train_steps": 4, "dry_run": True}
    runs = {at: prepare(settings(**options, network_args=[f"sort_at={at}"])) for at in (0, 0.1, 0.5)}
    said = {at: activation_bytes(run) for at, run in runs.items()}
    assert said[0.1] == said[0.5] == pytest.approx(said[0], rel=0.01)
    dials = runs[0.5].dials
    assert [(dial.step, dial.unsorted, dial.nested_from) for dial in dials] == [(0, False, None)] * len(dials)
    assert "estimated: not known" not in report(runs[0.5])


@pytest.mark.slow
def test_checkpointing_and_precision_lower_the_estimate(basics) -> None:
    sizes = {
        name: activation_bytes(prepare(settings(**basics, **options, network_train_unet_only=True, dry_run=True)))
        for name, options in {
            "all": {}, "checkpointed": {"gradient_checkpointing": True}, "bf16": {"mixed_precision": "bf16"},
        }.items()
    }  # fmt: skip
    assert sizes["checkpointed"] < 0.5 * sizes["all"]
    assert 0.5 * sizes["all"] < sizes["bf16"] < sizes["all"]


def test_blocks_by_the_names_of_info(basics) -> None:
    weights = ",".join(["0.5"] * 12)
    args = {"block_dims": ",".join(["0"] + ["4"] * 11 + ["6"] + ["2"] * 12), "down_lr_weight": weights}
    options = {
        "network_dim": 4,
        "network_alpha": 2,
        "network_args": args,
        "learning_rate": 1e-3,
        "text_encoder_lr": [5e-4],
    }
    run = prepare(settings(**{**basics, **options}, dry_run=True))
    found = blocks(run)
    adapter = Adapter.from_models(run.trained, adapter_name="default")
    architecture = adapter.architecture
    assert {name: block.modules for name, block in found.items()} == Counter(
        block_name(module, architecture) for module in adapter.modules
    )
    assert next(iter(found)) == "text_encoder"
    labels = [name for name in found if name.startswith(("IN", "MID", "OUT"))]
    assert labels == sorted(labels, key=lambda name: (["IN", "MI", "OU"].index(name[:2]), name))
    assert (found["MID"].ranks, found["MID"].rates) == ({6}, {"0.001"})
    assert (found["IN01"].ranks, found["IN01"].rates) == ({4}, {"0.0005"})
    assert found["text_encoder"].rates == {"0.0005"}
    assert sum(block.parameters for block in found.values()) == sum(p.numel() for p in run.parameters)
    for name, block in found.items():
        own = [pair.alpha for module, pair in adapter.pairs().items() if block_name(module, architecture) == name]
        assert sorted(block.alphas) == pytest.approx(sorted(set(own)))


def test_the_report(basics) -> None:
    said = report(prepare(settings(**basics, cache_latents=True, dry_run=True)))
    assert "block         modules  parameters  rank  alpha  rate" in said
    assert "VAE: " in said
    assert "(not on the device in a step)" in said
    assert "activations of 2 at " in said
    assert "together about " in said
