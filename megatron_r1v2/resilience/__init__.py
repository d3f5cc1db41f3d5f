"""Signals, lost ranks, skipped updates and kept rollouts: what a run survives."""
