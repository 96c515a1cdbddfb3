"""Publishing to a Hugging Face Hub and pulling from one, with proof."""
