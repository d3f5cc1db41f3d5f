"""Process groups and devices, collectives of objects, and megatron-core on machines without CUDA."""
