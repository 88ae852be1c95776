"""Adapters being made: pictures and captions, the training loop, sampling, resuming."""
