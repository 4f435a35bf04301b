"""Reads a model directory: its files, what they say about how to run it, published names."""
