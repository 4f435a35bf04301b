"""Causal language models: embedders and rerankers, and the networks they run on."""
