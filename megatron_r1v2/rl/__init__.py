"""The algorithms as pure functions: tensors and floats in, loss and metrics out."""
