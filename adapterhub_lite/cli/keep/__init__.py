"""Verbs that look after versions: add, list, show, diff, alias, pin, gc, sign, merge."""
