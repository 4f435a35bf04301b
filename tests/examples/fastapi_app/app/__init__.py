"""A search service."""
