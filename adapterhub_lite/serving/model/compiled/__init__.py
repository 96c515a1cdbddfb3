"""The compiled code of the forward pass, and what it is handed."""
