"""The plugin proves itself on the user's machine: what vLLM serves, next to what the reference model computes."""
