"""The GRPO stage."""
