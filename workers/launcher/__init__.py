"""The launcher: starts, watches, restarts, replaces and scales the workers of one machine."""
