"""The imports of the server of `ranks.forked_context`: done once, so that a process starts six seconds earlier."""

import gc

import megatron_r1v2.stages.align
import megatron_r1v2.stages.grpo.stage  # noqa: F401
import tests.stages.tiny_run  # noqa: F401

# Its processes would look through these imports in every collection (megatron-core asks for one in each save), and
# copy the memory that they look at.
gc.freeze()
