"""One decoder per architecture family, and Hugging Face checkpoints."""
