"""The files of a PEFT folder: a config and weights, in the folder itself or in a subfolder for each component."""

from pathlib import Path

from lora_adapters.convert.families.names import COMPONENTS

CONFIG, WEIGHTS, WEIGHTS_PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def is_peft_folder(folder: Path) -> bool:
    """Whether the folder, or one of its components' subfolders, contains a PEFT adapter."""
    return any((folder / part / CONFIG).is_file() for part in ("", *COMPONENTS))
