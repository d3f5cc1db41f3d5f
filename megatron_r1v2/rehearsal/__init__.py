"""The cluster run on a laptop: the stages' own code as one rank after the other, on tensors without memory."""
