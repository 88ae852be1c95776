"""Text-encoder layers above the one that is read are left out of training, so that several processes can train."""

import logging

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.adapters import ADAPTER, lora_layers
from lora_adapters.train.training.setup import prepare
from lora_adapters.train.training.sorting import sort_if_due

KINDS = {
    "lora": {},
    "c3lier": {"network_args": {"conv_dim": "2"}},
    "dylora": {"network_module": "networks.dylora", "network_args": {"unit": "1", "conv_dim": "2"}},
    "checkpointing": {"gradient_checkpointing": True},
    "dropouts": {"network_dropout": 0.1, "network_args": {"rank_dropout": "0.5", "module_dropout": "0.5"}},
    "clip_skip": {"clip_skip": 2},
    "text only": {"network_train_text_encoder_only": True},
    "U-Net only": {"network_train_unet_only": True},
}


@pytest.fixture
def one_process(tmp_path):
    """A process group of one: its wrapper checks the gradients as it does among many."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_every_trained_weight_gets_a_gradient_in_every_step(basics, request, one_process, model, kind) -> None:
    options = {**basics, **KINDS[kind], "pretrained_model_name_or_path": str(request.getfixturevalue(model))}
    run = prepare(settings(**options))
    run.training_mode()
    run.loss.denoiser = DistributedDataParallel(run.plain)
    for number, batch in zip(range(3), run.data.batches(0), strict=False):
        sort_if_due(run, number)
        run.tell_step(number, 0, batch)
        run.loss.training(batch).backward()
        assert all(parameter.grad is not None for parameter in run.parameters)


@pytest.mark.parametrize(
    ("model", "clip_skip", "layers"),
    [
        ("sd1", None, []),
        ("sd1", 1, []),
        ("sd1", 2, ["text_encoder.text_model.encoder.layers.1"]),
        ("sdxl", None, ["text_encoder.text_model.encoder.layers.1"]),
        ("sdxl", 2, ["text_encoder.text_model.encoder.layers.1"]),
    ],
)
def test_what_is_left_out(basics, request, caplog, model, clip_skip, layers) -> None:
    caplog.set_level(logging.INFO)
    path = str(request.getfixturevalue(model))
    run = prepare(settings(**{**basics, "pretrained_model_name_or_path": path, "clip_skip": clip_skip}))
    found = lora_layers(run.trained)
    frozen = {
        f"{name.component}.{name.path}" for name, one in found.items() if not one.lora_A[ADAPTER].weight.requires_grad
    }
    expected = {
        f"{name.component}.{name.path}" for name in found if f"{name.component}.{name.path}".startswith(tuple(layers))
    }
    assert frozen == (expected if layers else set())
    said = "6 modules in text-encoder layers whose output is not used are saved, but not trained"
    assert (said in caplog.text) == bool(layers)
