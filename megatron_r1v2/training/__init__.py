"""One update, made and kept: batches, forward passes, optimizer steps, checkpoints, verified weights."""
