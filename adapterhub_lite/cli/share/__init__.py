"""Verbs that move versions: push, pull, hub, export."""
