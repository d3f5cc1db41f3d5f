"""Measures of a model: Pass@1 over repeated runs, Pass@k, maj@k, format and hallucination rates."""
