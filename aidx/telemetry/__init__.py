"""Seeing a run: TensorBoard event files (`tensorboard`) and where its time goes (`profiler`)."""
