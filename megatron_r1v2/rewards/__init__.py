"""The rewards of rollouts: rules in worker processes, claims about images, reward models."""
