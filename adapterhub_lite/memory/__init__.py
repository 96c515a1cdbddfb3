"""Memory: what a run will need, and presets that need less. Knows a model's config, never its data."""
