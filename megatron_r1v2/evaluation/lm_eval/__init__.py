"""Evaluation shards as a task of lm-eval: `shards.yaml` and its functions."""
