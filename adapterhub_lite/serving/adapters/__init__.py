"""The adapters an engine answers with: where they come from, and which are in memory."""
