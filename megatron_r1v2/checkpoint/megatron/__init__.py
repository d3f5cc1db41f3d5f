"""Megatron checkpoints: the torch_dist format, the files of a run, and their checksums."""
