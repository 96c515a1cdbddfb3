"""Verbs that answer: serve, demo."""
