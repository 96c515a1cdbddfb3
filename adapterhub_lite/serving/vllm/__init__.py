"""vLLM as the engine behind the server: loaded with verified adapters under immutable names, asked by token ids."""
