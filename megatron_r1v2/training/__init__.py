"""How one update is made and kept: batches, forward passes, optimizer steps, checkpoints, verified weights."""
