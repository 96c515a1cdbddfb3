"""The forward pass of a step: packed rows in, logits out, with a LoRA per row."""
