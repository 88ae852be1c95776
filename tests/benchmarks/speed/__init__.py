"""Parts of the speed table: full-size pipelines without weights, and measurements in separate processes."""
