"""The report of a training run: charts, images, data, settings and commands to continue, in one HTML file."""
