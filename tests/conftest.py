"""Settings for all tests: offline, quiet, and one thread per process, since the tests run in parallel."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)
torch.set_flush_denormal(True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local Hub server on 127.0.0.1 that huggingface_hub uses in this process."""
    from tests.lora_adapters.hub_client import client_at
    from tests.lora_adapters.hub_server import HubServer

    with HubServer() as server:
        client_at(server, tmp_path / "hf", monkeypatch)
        yield server
