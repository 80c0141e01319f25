"""The GPU interpreter runs every warpgroup of a cluster as a thread of XLA's CPU pool."""

import os

os.environ.setdefault("NPROC", "16")  # read when the CPU backend starts; 2 cores would deadlock
