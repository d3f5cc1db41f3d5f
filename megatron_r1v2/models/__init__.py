"""The network: vision tower, adapter, language model and reward head, from megatron-core's layers.

Shape suffixes used in the whole project (`hidden_SBH` is [S, B, H]; Megatron is sequence-first, torch batch-first):

    B  rows of a batch                      S  tokens of a sequence
    H  hidden size of the language model    V  vocabulary (the local shard of it where tensor parallelism splits it)
    T  image tiles                          P  vision tokens of a tile (patches, and the class token where it is kept)
    E  hidden size of the vision tower      K  channels after pixel shuffle (E x 4 at ratio 0.5)
    F  image tokens (`<IMG_CONTEXT>`) of one tile after pixel shuffle; in [F, H], of all tiles together
    C  colour channels    H, W after C: height and width in pixels (`tiles_TCHW`)
    N  attention heads    D  size of a head    R  responses or samples    G  responses to one prompt
"""
