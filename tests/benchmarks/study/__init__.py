"""Parts of the rank study: tasks, methods, training and measuring, report."""
