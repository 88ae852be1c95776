"""The adapter types: a folder and a line here for each.

A type's folder holds `config.py`, with its config and `TYPE` (see `adapter_type.AdapterType`), and `layer.py` where its
forward pass is its own. Everything else finds it by its line: the tuner, `--network_module`, saving and restoring, the
optimizer groups, the public names and the API reference.
"""

# Folder -> what `lora_adapters` exports of it, and the module of the folder that has it. Light: nothing is imported.
REGISTERED: dict[str, dict[str, str]] = {
    "lierla": {"LierLaConfig": "config"},  # the first: plain LoRA, as which an adapter without a type is read
    "c3lier": {"C3LierConfig": "config"},
    "lycoris": {"LycorisConfig": "config"},
    "dylora": {"DyLoraConfig": "config", "set_rank": "rank_controller", "set_step": "rank_controller"},
}

PUBLIC = {name: f"{folder}.{module}" for folder, names in REGISTERED.items() for name, module in names.items()}
