"""Presets of `lora-adapters init`: a TOML file each, in which every value has its reason and its source."""
