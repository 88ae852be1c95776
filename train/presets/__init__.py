"""Presets of `lora-adapters init`: TOML files in which every value has a reason and a source."""
