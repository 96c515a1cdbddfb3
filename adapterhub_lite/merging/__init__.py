"""Merging: adapter folders in, an adapter folder or a merged model out, with a receipt."""
