"""Training of adapters: images and captions, the training loop, sampling, resuming."""
