"""OpenAI's format: what clients send, and what they get."""
