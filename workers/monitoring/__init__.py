"""Reports of a worker about itself: health, heartbeats, metrics, traces, speed."""
