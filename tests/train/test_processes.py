"""Two processes through accelerate give what one process with the same total batch gives."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from test_resume import PROGRAM, command_line

from lora_adapters.convert import Adapter
from lora_adapters.train.arguments import settings
from lora_adapters.train.loop import train


def test_two_processes_equal_one(basics, tmp_path) -> None:
    options = {
        **basics,
        "network_module": "networks.dylora",
        "network_args": {"unit": "1"},
        "validation_split": 0.25,
        "max_train_steps": 4,
        "cache_latents": True,
        "save_state": True,
    }
    one = train(settings(**options))
    two = {**options, "train_batch_size": 1, "output_dir": str(tmp_path / "two")}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    command += ["--num_cpu_threads_per_process=1", f"--main_process_port={29500 + os.getpid() % 400}"]
    finished = subprocess.run(
        [*command, str(PROGRAM), *command_line(two)], capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    for loss in (measured.loss for measured in one.held_out if measured.step == 4):
        assert f"{loss:.4f}" in finished.stderr + finished.stdout
    adapter = Adapter.load(Path(two["output_dir"]) / "last.safetensors")
    for name, expected in one.adapter.modules.items():
        torch.testing.assert_close(adapter.modules[name].up, expected.up, rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(adapter.modules[name].down, expected.down, rtol=1e-3, atol=2e-5)
