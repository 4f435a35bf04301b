"""From jobs to batches and back: encode threads, scheduler, device loop, completion."""
