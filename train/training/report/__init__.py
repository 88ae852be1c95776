"""The HTML report of a training run: charts, images, data, settings, and commands to use the adapter."""
