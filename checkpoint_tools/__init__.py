"""Tools for checkpoints: small command lines over megatron_r1v2/checkpoint/; each explains itself with --help."""

import gc

# A tool ends in seconds to minutes, and imports torch and transformers first: looking for garbage after every 700 new
# objects takes a fifth of that start.
gc.set_threshold(100_000)
