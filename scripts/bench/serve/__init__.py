"""Measurements of the engine, the server and the app."""
