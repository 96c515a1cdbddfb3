"""Verbs that move versions between machines and programs: push, pull, lock, hub, export."""
