"""The page about a training: charts, pictures, data, settings and the commands to go on, in one file."""
