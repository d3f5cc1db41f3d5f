"""The meaning of answers: read by the kind of its reference, compared by the rule of that kind (docs/rewards.md)."""
