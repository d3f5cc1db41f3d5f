"""How good a model is: Pass@1 over repeated runs, format and hallucination rates."""
