"""Hugging Face folders: configurations, weights, and the one two-way table of names."""
