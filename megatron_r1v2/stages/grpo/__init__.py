"""The GRPO stage: rollouts, selection with the buffer, updates."""
