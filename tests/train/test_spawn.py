"""Training where processes cannot be forked, as on Windows and macOS."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_adapters.convert import Adapter

PROGRAM = Path(__file__).parents[2] / "train" / "train_network.py"


@pytest.mark.slow
def test_the_program_trains_with_workers_that_are_spawned(basics, tmp_path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import multiprocessing\nmultiprocessing.set_start_method('spawn', force=True)\n"
    )
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "cp1252"}

    def trained(workers: int) -> Adapter:
        options = {**basics, "max_data_loader_n_workers": workers, "output_name": f"by{workers}", "max_train_steps": 1}
        command = [sys.executable, str(PROGRAM), *(f"--{name}={value}" for name, value in options.items())]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return Adapter.load(tmp_path / "out" / f"by{workers}.safetensors")

    alone, helped = trained(0), trained(1)
    for module, pair in alone.modules.items():
        assert torch.equal(pair.down, helped.modules[module].down), module
        assert torch.equal(pair.up, helped.modules[module].up), module
