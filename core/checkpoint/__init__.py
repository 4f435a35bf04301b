"""Finds a model directory, verifies it, and reads how to run it."""
