"""Adapters as data: names, files, arithmetic, checkpoints and the file tools. Needs torch and safetensors only."""
