"""Verbs that look after versions: list, show, alias, diff, gc, sign, lock, merge."""
