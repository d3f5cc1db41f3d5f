"""Metrics, and the files and displays of a run while it goes."""
