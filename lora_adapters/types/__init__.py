"""The adapter types: each has a subfolder and an entry in `REGISTERED`.

The folder contains `config.py`, with the config and `TYPE` (see `adapter_type.AdapterType`), and `layer.py` if the type
has its own forward pass. Everything else uses the entry to find the type: the tuner, `--network_module`, saving and
restoring, the optimizer groups, the public names and the API reference.
"""

# The names that `lora_adapters` exports from each folder, and their module. Nothing is imported here.
REGISTERED: dict[str, dict[str, str]] = {
    "lierla": {"LierLaConfig": "config"},  # must be first: plain LoRA, the type of adapters without a type
    "c3lier": {"C3LierConfig": "config"},
    "lycoris": {"LycorisConfig": "config"},
    "dylora": {"DyLoraConfig": "config", "set_rank": "rank_controller", "set_step": "rank_controller"},
}

PUBLIC = {name: f"{folder}.{module}" for folder, names in REGISTERED.items() for name, module in names.items()}
