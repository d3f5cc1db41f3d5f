"""Batches to updates: the step, the optimizer, checkpoints, metrics, and the loop of each stage."""
