"""Flash attention for Hopper: forward and backward kernels, masks as intervals, tile table."""
