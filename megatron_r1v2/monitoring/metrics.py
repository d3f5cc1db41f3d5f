"""Every metric that a run writes: name, unit, meaning, and the chart that the report draws it in.

One table for the recorder's line on the console, the charts of the report and docs/metrics.md. A name that is written
anywhere must be here (those of time and the machine are in machine_metrics.py); a new metric is a row, in a chart or
in `NOT_CHARTED`.
"""

from __future__ import annotations

import fnmatch

from megatron_r1v2.monitoring.machine_metrics import TIME
from megatron_r1v2.monitoring.metric import BY_MODALITY, FRACTION, Chart, Metric, Section

_REWARD = Section(
    "Reward and correctness",
    (
        Chart(
            "Reward",
            "Mean total reward of the fresh responses, and each part before its weight, over the responses to "
            "which it applies.",
            (
                Metric("critic/rewards/mean", "reward", "Total reward of the fresh responses.", short="reward"),
                Metric("reward/*/mean", "0 to 1", "One part of the reward, ours or a function's, where it applies."),
            ),
        ),
        Chart(
            "Reward model",
            "Mean raw score of the fresh responses; its part of the reward is this squashed.",
            (Metric("reward_model/score/mean", "raw score", "Score of the fresh responses.", short="score"),),
        ),
        Chart(
            "Validation",
            "Sampled responses to held-back prompts: how many are right, and how many have the right format.",
            (
                Metric("validation/pass_at_1", FRACTION, "Responses to held-back prompts that are right."),
                Metric("validation/format_rate", FRACTION, "Responses to held-back prompts in the right format."),
            ),
        ),
        Chart(
            "Hallucination",
            "Visual claims that the image contradicts, in training and on held-back prompts. It means something only "
            "where most responses make a claim. The dashed line is the rate that the calibrator holds.",
            (
                Metric("hallucination/rate", FRACTION, "Visual claims that the image contradicts.", short="training"),
                Metric(
                    "validation/hallucination_rate",
                    FRACTION,
                    "hallucination/rate on held-back prompts.",
                    short="validation",
                ),
            ),
            target="hallucination.target_rate",
        ),
        Chart(
            "Claim coverage",
            "Responses that make a visual claim at all.",
            (
                Metric("hallucination/coverage", FRACTION, "Responses that make a visual claim.", short="training"),
                Metric(
                    "validation/claim_coverage",
                    FRACTION,
                    "hallucination/coverage on held-back prompts.",
                    short="validation",
                ),
            ),
        ),
        Chart(
            "Calibrator",
            "What it moves: tau of the pairs, or the weight of the reward model. decision: 1 tightens, -1 lets go.",
            (
                Metric("hallucination/brake", "0 to 1", "How far the calibrator has moved from the setting."),
                Metric("hallucination/threshold", "margin", "The least margin of a pair that MPO trains on."),
                Metric("hallucination/model_weight", "weight", "The weight of the reward model's part in GRPO."),
                Metric("hallucination/decision", "-1, 0, 1", "1: tightened after this validation; -1: let go."),
            ),
        ),
    ),
)

_PREFERENCE = Section(
    "Preference",
    (
        Chart(
            "Rewards of pairs",
            "beta x (log-prob - that of the model the stage started from), summed over the response: chosen, "
            "rejected, their difference, and the shift of the quality term.",
            (
                Metric("rewards/chosen", "nats x beta", "Implicit reward of the chosen responses."),
                Metric("rewards/rejected", "nats x beta", "Implicit reward of the rejected responses."),
                Metric("rewards/margins", "nats x beta", "Chosen minus rejected.", short="margin"),
                Metric("mpo/delta", "nats x beta", "Shift of the quality term: the running mean of the rewards."),
            ),
        ),
        Chart(
            "Pairs in the right order",
            "Pairs whose chosen response has the higher reward.",
            (Metric("rewards/accuracies", FRACTION, "Pairs whose chosen reward is higher.", short="accuracy"),),
        ),
        Chart(
            "Log-probs of responses",
            "Summed over the response.",
            (
                Metric("logps/chosen", "nats", "Log-prob of the chosen responses, summed over the response."),
                Metric("logps/rejected", "nats", "Log-prob of the rejected responses, summed over the response."),
            ),
        ),
        Chart(
            "Terms of the loss",
            "Each before its weight; the first two start at log 2 and 2 log 2.",
            (
                Metric("mpo/preference_loss", "nats", "DPO term of the loss, before its weight."),
                Metric("mpo/quality_loss", "nats", "BCO term of the loss, before its weight."),
                Metric("mpo/generation_loss", "nats", "SFT term of the loss, before its weight."),
            ),
        ),
        Chart(
            "Pairs of a step",
            "Trained on, and left out because their margin is below preference.min_margin.",
            (
                Metric("mpo/pairs_kept", "pairs", "Pairs trained on."),
                Metric("mpo/pairs_below_margin", "pairs", "Pairs left out for their margin."),
            ),
        ),
    ),
)

_REWARD_MODEL = Section(
    "Reward model in training",
    (
        Chart(
            "Ranking",
            "Pairs whose better response has the higher score, in training and held out; guessing gives 50 %.",
            (
                Metric("reward_model/accuracy", FRACTION, "Pairs in the right order; a tie counts half."),
                Metric("validation/accuracy", FRACTION, "The same on held-back pairs.", short="validation"),
            ),
        ),
        Chart(
            "Scores of pairs",
            "Mean raw scores of the better and the worse responses, and how far they are apart.",
            (
                Metric("reward_model/margin", "raw score", "Score of the better minus the worse response."),
                Metric("reward_model/chosen_score", "raw score", "Score of the better responses."),
                Metric("reward_model/rejected_score", "raw score", "Score of the worse responses."),
            ),
        ),
    ),
)

_BUFFER = Section(
    "Selective Sample Buffer",
    (
        Chart(
            "Effective responses",
            "Responses from groups whose answers (or rewards: buffer.effective_by) differ: those just generated, and "
            "those trained on after the buffer topped them up.",
            (
                Metric(
                    "ssb/fresh_effective_fraction",
                    FRACTION,
                    "Effective responses among all that were generated.",
                    short="effective",
                ),
                Metric(
                    "ssb/trained_effective_fraction",
                    FRACTION,
                    "Effective responses among those trained on.",
                    short="trained effective",
                ),
            ),
            target="buffer.target_effective_fraction",
        ),
        Chart(
            "Size",
            "Responses held, and drawn a step.",
            (
                Metric("ssb/size", "responses", "Responses in the buffer."),
                Metric("ssb/replayed", "responses", "Responses drawn from the buffer."),
                Metric("ssb/distinct_prompts", "prompts", "Different prompts trained on."),
                Metric("ssb/distinct_samples", "responses", "Different responses trained on."),
            ),
        ),
        Chart(
            "Reuse",
            "How often a replayed response has been trained on.",
            (Metric("ssb/reuse_mean", "times", "How often a replayed response has been trained on."),),
        ),
        Chart(
            "Age",
            "Steps since a replayed response was generated.",
            (
                Metric("ssb/age_max", "steps", "Steps since the oldest replayed response was generated."),
                Metric("ssb/age_mean", "steps", "Steps since a replayed response was generated."),
            ),
        ),
        Chart(
            "Replayed responses in the update",
            "Tokens clipped (replayed, and all), and the replayed responses' share of the gradient.",
            (
                Metric(
                    "ssb/clip_fraction_replayed",
                    FRACTION,
                    "Tokens of replayed responses that are clipped.",
                    short="clipped, replayed",
                ),
                Metric("actor/pg_clipfrac", FRACTION, "Tokens that are clipped.", short="clipped, all"),
                Metric("ssb/gradient_share_replayed", FRACTION, "The replayed responses' share of the gradient."),
            ),
        ),
    ),
)

_RESPONSES = Section(
    "Responses",
    (
        Chart(
            "Length",
            "Tokens of a response.",
            (
                Metric("response_length/mean", "tokens", "Tokens of a fresh response.", short="mean"),
                Metric("response_length/max", "tokens", "Tokens of the longest fresh response."),
            ),
        ),
        Chart(
            "Cut at the limit",
            "Responses that reached generation.max_response_tokens.",
            (Metric("response_length/clip_ratio", FRACTION, "Responses cut at generation.max_response_tokens."),),
        ),
    ),
)

_OPTIMISATION = Section(
    "Optimisation",
    (
        Chart(
            "Loss",
            "The loss of the update, and its parts. In GRPO its height says nothing of how good the model is: it is "
            "of other responses in each step.",
            (
                Metric("actor/loss", "loss", "Loss of the update."),
                Metric("actor/nll", "nats", "Negative log-likelihood of a token of the data."),
                Metric("actor/kl_loss", "nats", "KL (k3) to the reference, before its coefficient."),
            ),
        ),
        Chart(
            "Entropy",
            "Of the policy's distribution over the next token, at the response tokens trained on. One that falls to 0 "
            "early has stopped to explore.",
            (
                Metric(
                    "actor/entropy",
                    "nats",
                    "Entropy of the policy's next token, at the response tokens trained on.",
                    suffixes=BY_MODALITY,
                ),
            ),
        ),
        Chart("Gradient norm", "Before clipping.", (Metric("actor/grad_norm", "norm", "Before clipping."),)),
        Chart("Learning rate", "Of the optimizer step.", (Metric("actor/lr", "rate", "Of the optimizer step."),)),
        Chart(
            "Policy change",
            "Estimated KL between the policy a response is weighed against and the trained one: all, replayed.",
            (
                Metric("actor/ppo_kl", "nats", "KL between the old policy and the trained one.", short="all"),
                Metric("ssb/ppo_kl_replayed", "nats", "The same over replayed responses.", short="replayed"),
            ),
        ),
    ),
)

_MISMATCH = Section(
    "Engine against training forward",
    (
        Chart(
            "Log-prob mismatch",
            "Mean of exp|engine - training| over the tokens sampled, less 1: 0 is perfect agreement.",
            (
                Metric(
                    "train/token_mult_prob_error",
                    "ratio",
                    "Mean of exp|engine - training| over the tokens.",
                    suffixes=BY_MODALITY,
                ),
            ),
            minus=1.0,
        ),
        Chart(
            "Divergence",
            "KL between the engine's distribution and the trained one.",
            (
                Metric("rollout_corr/k3_kl", "nats", "KL by the k3 estimator.", suffixes=BY_MODALITY),
                Metric("rollout_corr/kl", "nats", "KL by the mean log-ratio.", suffixes=BY_MODALITY),
            ),
        ),
    ),
)

SECTIONS = (
    _REWARD,
    _PREFERENCE,
    _REWARD_MODEL,
    _BUFFER,
    _RESPONSES,
    _OPTIMISATION,
    _MISMATCH,
    TIME,
)
"""The charts of the report, in its order."""

NOT_CHARTED = (
    Metric("actor/ratio_mean", "ratio", "Mean importance ratio of the tokens."),
    Metric("actor/skipped_updates", "updates", "Updates left out: their gradient was not finite or too large."),
    Metric("actor/updates", "updates", "Updates of the step."),
    Metric("data/samples_read", "samples", "Samples read, since the start."),
    Metric("gate/log_prob_abs_diff", "nats", "Mean |engine - training| of the check before generation."),
    Metric("memory_gib/kv_cache", "GiB", "The key-value cache of the step's generation, on a GPU of replica 0."),
    Metric("mpo/min_margin", "margin", "The least margin of a pair that is trained on."),
    Metric("preemption/lead_margin_s", "s", "What a step and a save leave of checkpoint.lead_seconds; below 0: lost."),
    Metric("reward_model/loss", "nats", "Bradley-Terry loss, without the centring term."),
    Metric("rollout/evictions", "requests", "Requests that lost their KV cache for want of room, and began anew."),
    Metric("rollout/groups_dropped", "prompts", "Groups dropped: older than buffer.max_age, or not finite."),
    Metric("rollout/groups_in_flight", "prompts", "Groups that go on in the next step (generation.segment_tokens)."),
    Metric("rollout/responses", "responses", "Responses of the step's complete groups."),
    Metric("rollout/responses_filtered", "responses", "Responses left out by the filter of the groups."),
    Metric("rollout/rounds", "rounds", "Rounds of generation; above 1 with dynamic sampling."),
    Metric("rollout/tokens", "tokens", "Their tokens, all segments."),
    Metric("rollout_corr/chi2_seq", "1", "Chi-squared divergence by responses.", suffixes=BY_MODALITY),
    Metric("rollout_corr/chi2_token", "1", "Chi-squared divergence by tokens.", suffixes=BY_MODALITY),
    Metric("rollout_corr/log_ppl_abs_diff", "nats", "Mean |log_ppl_diff|.", suffixes=BY_MODALITY),
    Metric("rollout_corr/log_ppl_diff", "nats", "Engine minus training, mean over a response.", suffixes=BY_MODALITY),
    Metric("rollout_corr/log_ppl_diff_max", "nats", "The largest log_ppl_diff.", suffixes=BY_MODALITY),
    Metric("rollout_corr/log_ppl_diff_min", "nats", "The smallest log_ppl_diff.", suffixes=BY_MODALITY),
    Metric("rollout_corr/log_prob_abs_diff", "nats", "Mean |engine - training| of a token.", suffixes=BY_MODALITY),
    Metric("rollout_corr/ppl_ratio", "ratio", "exp(log_ppl_diff).", suffixes=BY_MODALITY),
    Metric("rollout_corr/rollout_log_ppl", "nats", "Log-perplexity by the engine.", suffixes=BY_MODALITY),
    Metric("rollout_corr/rollout_ppl", "1", "Perplexity by the engine.", suffixes=BY_MODALITY),
    Metric("rollout_corr/training_log_ppl", "nats", "Log-perplexity by the training forward.", suffixes=BY_MODALITY),
    Metric("rollout_corr/training_ppl", "1", "Perplexity by the training forward.", suffixes=BY_MODALITY),
    Metric("ssb/ratio_mean_replayed", "ratio", "Mean importance ratio of the tokens of replayed responses."),
    Metric("validation/chosen_score", "raw score", "reward_model/chosen_score on held-back pairs."),
    Metric("validation/loss", "nats", "reward_model/loss on held-back pairs."),
    Metric("validation/margin", "raw score", "reward_model/margin on held-back pairs."),
    Metric("validation/rejected_score", "raw score", "reward_model/rejected_score on held-back pairs."),
)
"""For metrics.jsonl, wandb and TensorBoard only."""

METRICS = (*(metric for section in SECTIONS for chart in section.charts for metric in chart.metrics), *NOT_CHARTED)


def find_metric(name: str) -> Metric | None:
    """Return the row that a name belongs to; None: it is not in the table."""
    return next((each for each in METRICS if any(fnmatch.fnmatchcase(name, known) for known in each.names)), None)


def console_name(name: str) -> str:
    """Return the short name of a metric, such as "reward" or "answer"."""
    metric = find_metric(name)
    if metric is None or not metric.short:
        # `reward/answer/mean` and `reward/format/mean` differ in the middle.
        return name.removesuffix("/mean").rpartition("/")[2]
    return metric.short
