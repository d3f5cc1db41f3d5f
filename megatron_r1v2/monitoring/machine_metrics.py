"""The rows of the table of metrics that tell of time, speed, memory and trouble."""

from __future__ import annotations

from megatron_r1v2.monitoring.metric import FRACTION, Chart, Metric, Section

TIME = Section(
    "Time and trouble",
    (
        Chart(
            "Seconds by phase",
            "Wall-clock seconds of a step.",
            (
                Metric("timing_s/data", "s", "Reading of the prompts: what the step waits for the data."),
                Metric("timing_s/evaluate", "s", "Sampled responses to held-back prompts."),
                Metric("timing_s/exchange", "s", "Samples on the way to the ranks that train them."),
                Metric("timing_s/gate", "s", "The check that engine and training compute with the same weights."),
                Metric("timing_s/generate", "s", "Generation."),
                Metric(
                    "timing_s/log_probs",
                    "s",
                    "Old log-probs by the training forward; with one update a step its own forward gives them.",
                ),
                Metric("timing_s/reference", "s", "Log-probs of the reference, before the first step."),
                Metric("timing_s/reward", "s", "Scoring."),
                Metric("timing_s/save", "s", "The part of saving that training waits for."),
                Metric("timing_s/step", "s", "The whole step."),
                Metric("timing_s/update", "s", "Forward, backward and optimizer step."),
                Metric("timing_s/validate", "s", "Scores of held-back pairs."),
            ),
            stacked=True,
        ),
        Chart(
            "Speed",
            "Tokens of all ranks a second: generated in the generation phase, computed in the update.",
            (
                Metric("perf/generated_tokens_per_second", "tokens/s", "Generated tokens of all replicas."),
                Metric("perf/update_tokens_per_second", "tokens/s", "Tokens that the update computes, of all ranks."),
            ),
        ),
        Chart(
            "Share of the peak",
            "Floating-point operations of the update against the peak of the GPUs in bf16. Those of attention and of "
            "the vision tower are not counted, so the true share is higher. Only for GPUs whose peak is known.",
            (Metric("perf/mfu/actor", FRACTION, "Model FLOPs utilisation of the update.", short="MFU"),),
        ),
        Chart(
            "GPU memory",
            "The largest of all ranks: held by tensors now, by torch's allocator, and the peak of each phase.",
            (
                Metric("memory_gib/allocated", "GiB", "Held by tensors at the end of the step."),
                Metric("memory_gib/reserved", "GiB", "Held by torch's allocator at the end of the step."),
                Metric("memory_gib/*_peak", "GiB", "Most that tensors held at once in a phase."),
            ),
        ),
        Chart(
            "Waiting for responses",
            "Seconds that a replica whose prompts are done waits for the others, the step's generations added up.",
            (
                Metric("rollout/wait_s/mean", "s", "Wait of a replica for the others, mean.", short="mean"),
                Metric("rollout/wait_s/max", "s", "Wait of the first replica that was done.", short="max"),
            ),
        ),
        Chart(
            "Tokens computed",
            "Tokens of a step in prefill and training, and those with a prompt for each response.",
            (
                Metric("perf/prefill_tokens", "tokens", "Tokens prefilled in generation."),
                Metric("perf/prefill_tokens_separate", "tokens", "The same with a prompt for each response."),
                Metric("perf/update_tokens", "tokens", "Tokens of the updates."),
                Metric("perf/update_tokens_separate", "tokens", "The same with a prompt in front of each response."),
                Metric("perf/log_probs_tokens", "tokens", "Tokens of the old log-probs, where they are a phase."),
                Metric("perf/log_probs_tokens_separate", "tokens", "The same with a prompt for each response."),
            ),
        ),
        Chart(
            "Mixture",
            "Share of each data set in the prompts of the step; data.train has their weights.",
            (Metric("data/share/*", FRACTION, "Share of a data set in the prompts of the step."),),
        ),
        Chart(
            "Effective responses by data set",
            "Responses from groups that differ, of all to the prompts of a set.",
            (
                Metric(
                    "data/effective_fraction/*", FRACTION, "Effective responses among those to a data set's prompts."
                ),
            ),
        ),
        Chart(
            "Trouble",
            "Checks that timed out or crashed, samples that could not be read or were left out.",
            (
                Metric("verifier/timeouts", "checks", "Checks of a response that ran out of time; each scores 0."),
                Metric("verifier/crashes", "checks", "Checks of a response that failed; each scores 0."),
                Metric("data/corrupt_samples", "samples", "Samples that could not be read, since the start."),
                Metric("data/too_long_left_out", "prompts", "Left out as too long, since the start."),
                Metric("data/text_only_left_out", "prompts", "Left out, since no trained part sees them."),
            ),
        ),
    ),
)
