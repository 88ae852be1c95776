"""What --dry_run says of captions and memory is what training does."""

import pytest

from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.dry_run import captions, choices, memory, report
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


def test_captions_are_those_of_the_first_epoch(basics, pictures) -> None:
    options = {**basics, "shuffle_caption": True, "caption_tag_dropout_rate": 0.3}
    for file in (pictures / "1_shape").glob("*.txt"):
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
    assert "  unet_reg0: 0.5, " in report(run)
