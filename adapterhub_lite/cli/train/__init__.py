"""Verbs that produce an adapter and measure it: plan, train, eval."""
