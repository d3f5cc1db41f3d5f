"""What an answer means: read by the kind of its reference, then compared by the rule of that kind (docs/rewards.md)."""
