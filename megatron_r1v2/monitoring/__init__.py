"""Metrics, and what a run writes and shows while it goes."""
