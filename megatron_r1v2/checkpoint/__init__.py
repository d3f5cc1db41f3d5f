"""Model files: Hugging Face folders, Megatron checkpoints, and the conversions between them."""
