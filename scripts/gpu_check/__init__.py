"""One command that proves and measures what needs a GPU: see `__main__`."""
