"""Tools for checkpoints: small command lines over megatron_r1v2/checkpoint/; each explains itself with --help."""
