"""What the server of `ranks.forked_context` imports once: processes start with it, not six seconds later."""

import megatron_r1v2.training.align
import megatron_r1v2.training.grpo  # noqa: F401
import tests.training.tiny_run  # noqa: F401
