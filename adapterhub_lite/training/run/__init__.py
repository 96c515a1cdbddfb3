"""What happens around the steps of a run: checks, checkpoints, memory, progress, the record."""
