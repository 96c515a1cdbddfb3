"""A base with its adapter, ready to train."""
