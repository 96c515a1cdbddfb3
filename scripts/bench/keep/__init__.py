"""Measurements of the registry, merging and the hub."""
