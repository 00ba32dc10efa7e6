"""The paged KV cache and the prefix cache in front of it."""
