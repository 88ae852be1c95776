"""Parts of the speed table: full-size pipelines without weights, and what is measured in processes of their own."""
