"""The engine: one thread, one frozen base, requests for many adapters in one batch."""
