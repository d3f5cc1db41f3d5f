"""Prompts to rollouts: the dynamic engine of megatron-core, fed with images."""
