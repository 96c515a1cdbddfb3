"""Rows of any shape in, batches of tokens with their mask out."""
