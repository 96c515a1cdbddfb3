"""One tab of the page a module pair: its widgets, and what they do."""
