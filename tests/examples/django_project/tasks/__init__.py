"""Jobs of the project: an app called `tasks`, which embedq's own does not meet."""
