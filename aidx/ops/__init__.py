"""Pure tensor functions: plain arrays in, plain arrays out; the only door to `pallas_kernels`."""
