"""Adapters as others hand them over: archives, run folders, other writers' names and formats, made into PEFT's two files."""
