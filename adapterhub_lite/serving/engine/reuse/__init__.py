"""What is computed once for several: the beginnings of prompts, and tokens that are likely to come."""
