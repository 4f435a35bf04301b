"""`python -m embedq` and the command `embedq`."""
