"""What a worker reports about itself: health, heartbeats, metrics, traces, speed."""
