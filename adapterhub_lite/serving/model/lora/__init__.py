"""LoRA pairs beside the products of a step, and changes to whole modules for a step of their own."""
