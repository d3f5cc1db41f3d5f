"""Prompts: tokenizer and chat template, image tiling, WebDataset shards, the stream that training reads."""
