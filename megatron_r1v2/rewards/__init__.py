"""Rollouts to scores: answer and format rules in worker processes, claims about images."""
