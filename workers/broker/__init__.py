"""How jobs travel between Redis and a worker: fetching, leases, acknowledgements, dead letters."""
