"""Survival of a run: signals, lost ranks, skipped updates, finished rollouts, and files that are whole or not there."""
