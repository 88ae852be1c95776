#!/usr/bin/env python3
"""Train an adapter for Flux.1: `train_network.py` under kohya's script name for Flux.1.

usage: accelerate launch flux_train_network.py --pretrained_model_name_or_path=... --dataset_config=... --output_dir=...
       --network_module=networks.lora_flux ...   (all options: --help)
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a file from a checkout: replace this folder on Python's path by its parent, which contains the package.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lora_adapters.train.train_network import main

if __name__ == "__main__":
    sys.exit(main())
