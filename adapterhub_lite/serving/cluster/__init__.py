"""Several engines as one, on Ray Serve."""
