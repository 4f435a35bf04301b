"""Worker processes: one per device, started and watched by the launcher."""
