"""aidx: attention at the speed of the hardware, and what a language model needs on top of it."""

__version__ = "0.1.0"
