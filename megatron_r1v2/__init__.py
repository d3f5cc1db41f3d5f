"""Training of Skywork-R1V2-class vision-language reasoning models on Megatron-core."""

__version__ = "0.1.0"
