"""Memory-bound kernels: norms, rotary embedding, gated activations, softmax cross-entropy."""
