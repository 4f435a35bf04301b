"""Moves jobs between Redis and a worker: fetching, leases, acknowledgements, dead letters."""
