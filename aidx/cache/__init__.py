"""Contiguous and paged KV caches, and the block pool."""
