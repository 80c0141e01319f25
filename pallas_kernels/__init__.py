"""GPU kernels in Pallas Mosaic GPU.  Imports jax and nothing else."""
