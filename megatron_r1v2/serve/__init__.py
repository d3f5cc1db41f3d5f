"""Models behind HTTP endpoints: small servers on transformers, for what no other server loads."""
