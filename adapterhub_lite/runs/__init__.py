"""Training runs as they lie on disk: one format that `train` writes, and the command line and the app read. No torch."""
