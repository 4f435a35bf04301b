"""Parts of datasets: read, computed and written by a worker, on threads of their own."""
