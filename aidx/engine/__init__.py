"""Continuous batching: requests, scheduler, step, engine."""
