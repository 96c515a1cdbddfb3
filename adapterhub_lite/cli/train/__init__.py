"""Verbs that make an adapter: plan, train, eval."""
