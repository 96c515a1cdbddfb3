"""Measurements of the loss, of a training step and of memory."""
