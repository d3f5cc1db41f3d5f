"""Thin HTTP endpoints: a Megatron checkpoint to evaluate and try without an export, and Skywork-VL-Reward."""
