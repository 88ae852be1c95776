"""Adapters being made: images and captions, the training loop, sampling, resuming."""
