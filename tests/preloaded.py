"""What the server of `ranks.forked_context` imports once: processes start with it, not six seconds later."""

import megatron_r1v2.stages.align
import megatron_r1v2.stages.grpo.stage  # noqa: F401
import tests.stages.tiny_run  # noqa: F401
