"""Ragged and sparse arrays as pytrees, and `vmap` over them."""
