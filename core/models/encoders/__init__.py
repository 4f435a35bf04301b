"""Bidirectional encoders: embedders, cross-encoders, and the networks they run on."""
