"""Rollouts: megatron-core's dynamic inference engine with images, reproducible sampling and shared prompts."""
