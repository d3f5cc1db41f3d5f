"""Preference pairs from the model's own responses: the work of `r1v2 pairs`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from megatron_r1v2.config.recipes import PairsRecipe
from megatron_r1v2.data.prompts import without_images
from megatron_r1v2.data.samples import SampleError
from megatron_r1v2.data.shards import check_shards
from megatron_r1v2.generation.engine import Sampling
from megatron_r1v2.generation.queue import SharedPromptQueue
from megatron_r1v2.monitoring.progress import progress_bar
from megatron_r1v2.parallel import objects
from megatron_r1v2.resilience.run_lock import hold_folder
from megatron_r1v2.rewards.format import format_score
from megatron_r1v2.rewards.model import RewardModel
from megatron_r1v2.rewards.replica import ReplicaScorer
from megatron_r1v2.rewards.verifiers import VerifierPool
from megatron_r1v2.rl.preference_pairs import Candidate, best_chosen, choose_pairs, dropout_ntp_pair, is_sampled
from megatron_r1v2.stages.loaded_model import LoadedModel, open_model
from megatron_r1v2.stages.loaded_reward_model import open_reward_model
from megatron_r1v2.stages.pair_shards import (
    PairCounts,
    PromptPairs,
    UnfinishedPairs,
    count_pairs,
    counts_table,
)
from megatron_r1v2.stages.step_prompts import in_groups
from megatron_r1v2.types import Prompt, Rollout, ScoredRollout

Value = TypeVar("Value")

# Every pair whose chosen response is better: preference.min_margin of the mpo stage leaves out those of small margin.
_MIN_MARGIN = 0.0
# A response that was cut teaches length, one without its form teaches form: the pairs are to teach reasoning.
_REJECT_ILL_FORMED = False


def run_pairs(recipe: PairsRecipe, *, reward_model: RewardModel | None = None) -> Path:
    """Write preference pairs made of responses to the prompts of `data.train` to `run.output_dir`.

    Args:
        reward_model: what `reward.model_weight` weighs; None: what the `reward_model` section names, if anything.

    Raises:
        ValueError: rounds kept from an earlier attempt were made with other settings, or there is no pair.
    """
    unfinished = UnfinishedPairs(recipe)
    with open_model(recipe) as loaded, loaded.verifiers() as pool:
        is_main, version = loaded.context.is_main, loaded.version
        with hold_folder(unfinished.folder, loaded.context, output_dir=unfinished.output):
            _generate(PairMaker(loaded, recipe, pool, reward_model), unfinished)
    # The process groups are gone: other ranks need not wait for the files.
    if is_main:
        remark = {"model": recipe.model.checkpoint or recipe.model.hf_path, "policy_version": version}
        Console().print(counts_table(unfinished.finish(recipe.data.train_text, remark)))
    return unfinished.output


def _generate(maker: PairMaker, unfinished: UnfinishedPairs) -> None:
    """Collective over the world: do the rounds that are not on disk yet."""
    recipe, loaded = maker.recipe, maker.loaded
    is_main = loaded.context.is_main
    num_responses = recipe.generation.responses_per_prompt
    per_round = recipe.train.prompts_per_step
    available = sum(check_shards(recipe.data.train_text).values())
    total = available * num_responses
    unfinished.check_rows(loaded.print_survey(recipe.data.train_text))
    # The main rank's word counts: another one may see the file system later.
    finished = set(objects.all_gather(unfinished.rounds())[0])
    prompts = loaded.read_prompts(recipe.data.train_text)
    with progress_bar("pairs", total, shown=is_main) as show:
        for number, of_round in enumerate(in_groups(prompts, per_round)):
            done = number * per_round * num_responses
            if number not in finished:
                found, counts = maker.make_pairs(of_round, name=str(number), progress=_counting_from(done, show))
                if is_main:
                    unfinished.write_round(number, found, counts)
            show(done + len(of_round) * num_responses)


def _counting_from(done: int, show: Callable[[int], None]) -> Callable[[int], None]:
    return lambda count: show(done + count)


class PairMaker:
    """A maker of preference pairs: it samples responses to prompts, scores them, and chooses.

    Args:
        pool: answer checkers, on the leader of each replica.
    """

    def __init__(
        self, loaded: LoadedModel, recipe: PairsRecipe, pool: VerifierPool | None, reward_model: RewardModel | None
    ) -> None:
        self.loaded = loaded
        self.pool = pool
        self.reward_model = open_reward_model(loaded, recipe) if reward_model is None else reward_model
        self.recipe = recipe
        self.engine = loaded.engine()
        # DropoutNTP goes on from the first half of a response: prompts may be longer by that, responses are shorter.
        self.prefix_tokens = self.recipe.generation.max_response_tokens // 2
        self.continuing_engine = loaded.engine(prefix_tokens=self.prefix_tokens)
        self.features = loaded.feature_cache()

    def make_pairs(
        self, prompts: Sequence[Prompt], *, name: str, progress: Callable[[int], None]
    ) -> tuple[list[PromptPairs], PairCounts]:
        """Collective over the world: sample responses to prompts, score them, and choose pairs.

        Args:
            prompts: the same on every rank.
            name: never used before in this process.
            progress: called with how many responses there are, counted on this replica for all of them.

        Returns:
            The pairs of each prompt, in their order, and the counts; the same on every rank.
        """
        pairs = self.recipe.pairs
        by_key = {prompt.key: prompt for prompt in prompts}
        scored, counts = self._respond(prompts, name, progress)
        groups: dict[str, list[ScoredRollout]] = {}
        for response in scored:
            groups.setdefault(response.rollout.prompt_key, []).append(response)
        # Each replica has whole groups: pairs are chosen where the responses are.
        mine, to_continue = {}, {}
        for key, group in groups.items():
            candidates = [self._candidate(response, by_key[key]) for response in group]
            mine[key] = choose_pairs(
                candidates,
                max_pairs=pairs.max_pairs_per_prompt,
                min_margin=_MIN_MARGIN,
                reject_ill_formed=_REJECT_ILL_FORMED,
            )
            best = best_chosen(candidates) if self._is_drawn(by_key[key]) else None
            if best is not None:
                to_continue[key] = (candidates[best], _first_half(group[best].rollout))
        continued = self._continue_without_images(by_key, {key: half for key, (_, half) in to_continue.items()}, name)
        for key, (chosen, _) in to_continue.items():
            pair, dropped = dropout_ntp_pair(
                chosen, continued[key], min_margin=_MIN_MARGIN, reject_ill_formed=_REJECT_ILL_FORMED
            )
            mine[key] = ([*mine[key][0], *([pair] if pair else [])], mine[key][1] + dropped)
        world = self._gather(mine)
        found = [PromptPairs(key, world[key][0], dict(world[key][1])) for key in by_key]
        return found, count_pairs(found, **counts)

    def _respond(
        self, prompts: Sequence[Prompt], name: str, progress: Callable[[int], None]
    ) -> tuple[list[ScoredRollout], dict[str, int]]:
        """Collective over the world: generate and score; return this replica's responses, and sums over all."""
        generation, context = self.recipe.generation, self.loaded.context
        total = len(prompts) * generation.responses_per_prompt
        self.features.clear()
        rollouts = self.engine.generate(
            SharedPromptQueue(prompts, context=context, name=f"pairs-{name}"),
            Sampling(
                num_responses=generation.responses_per_prompt,
                policy_version=self.loaded.version,
                # Another checkpoint gets other draws.
                step=self.loaded.version,
                temperature=generation.temperature,
                max_response_tokens=generation.max_response_tokens,
            ),
            features=self.features,
            progress=lambda responses, _: progress(min(total, responses * context.data_size)),
        )
        scored, failures = self._score({prompt.key: prompt for prompt in prompts}, rollouts)
        mine = {
            "responses": len(scored),
            "right": sum(response.rule_correct for response in scored),
            "verifier_failures": failures,
        }
        world = objects.all_gather(mine, context.groups.dp)
        return scored, {key: sum(part[key] for part in world) for key in mine}

    def _is_drawn(self, prompt: Prompt) -> bool:
        """Return whether DropoutNTP uses this prompt, given a response fit to be chosen."""
        fraction, seed = self.recipe.pairs.dropout_ntp_fraction, self.recipe.run.seed
        return prompt.modality == "image" and is_sampled(prompt.key, fraction, seed=seed)

    def _continue_without_images(
        self, prompts: Mapping[str, Prompt], prefixes: Mapping[str, tuple[int, ...]], name: str
    ) -> dict[str, Candidate]:
        """Collective over the world: continue all replicas' prefixes; return scored continuations by prompt key."""
        generation, tokenizer = self.recipe.generation, self.loaded.tokenizer
        world = self._gather(prefixes)
        blind = [(key, without_images(prompts[key], tokenizer, prefix=world[key])) for key in sorted(world)]
        begun = {prompt.key: key for key, prompt in blind}
        rollouts = self.continuing_engine.generate(
            SharedPromptQueue(
                [prompt for _, prompt in blind], context=self.loaded.context, name=f"pairs-{name}-without-images"
            ),
            Sampling(
                num_responses=1,
                policy_version=self.loaded.version,
                step=self.loaded.version,
                temperature=generation.temperature,
                max_response_tokens=generation.max_response_tokens - self.prefix_tokens,
            ),
            features=self.features,
        )
        whole = []
        for rollout in rollouts:
            key = begun[rollout.prompt_key]
            whole.append(replace(rollout, prompt_key=key, token_ids=(*world[key], *rollout.token_ids)))
        scored, _ = self._score(prompts, whole)
        mine = {(key := response.rollout.prompt_key): self._candidate(response, prompts[key]) for response in scored}
        return self._gather(mine)

    def _gather(self, mine: Mapping[str, Value]) -> dict[str, Value]:
        """Collective over the data-parallel ranks: return the values of all of them."""
        parts = objects.all_gather(dict(mine), self.loaded.context.groups.dp)
        return {key: value for part in parts for key, value in part.items()}

    def _score(self, prompts: Mapping[str, Prompt], rollouts: Sequence[Rollout]) -> tuple[list[ScoredRollout], int]:
        scorer = ReplicaScorer(
            self.recipe.reward,
            self.loaded.context,
            decode=self.loaded.tokenizer.decode,
            pool=self.pool,
            reward_model=self.reward_model,
            max_response_tokens=self.recipe.generation.max_response_tokens,
        )
        scored, counts = scorer.score(prompts, rollouts)
        return scored, int(counts["verifier_timeouts"] + counts["verifier_crashes"])

    def _candidate(self, scored: ScoredRollout, prompt: Prompt) -> Candidate:
        return Candidate(
            text=scored.text,
            total=scored.total,
            # Without an answer no response is wrong: the totals alone decide which is better.
            correct=scored.rule_correct or not prompt.answer,
            finished=scored.rollout.finish_reason == "stop",
            well_formed=format_score(scored.text) == 1.0,
            encodable=self._is_encodable(scored.text),
            checked=scored.checked,
        )

    def _is_encodable(self, text: str) -> bool:
        tokenizer = self.loaded.tokenizer
        try:
            tokenizer.encode_response(text, tokenizer.turn_end(self.recipe.generation.stop_tokens))
        except SampleError:
            return False
        return True


def _first_half(rollout: Rollout) -> tuple[int, ...]:
    """Return the first half of the tokens of a response that ended by itself, its stop token not counted."""
    return rollout.token_ids[: (len(rollout.token_ids) - 1) // 2]
