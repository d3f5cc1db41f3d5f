"""One turn of a peer for benchmarks/step_vs_trl.py, in an environment of its own: TRL, or a loop written by hand.

    python -m benchmarks.step_peers WORK CASE SYSTEM WARMUP STEPS OUTPUT

The loop is what an expert writes with transformers in an afternoon: features of the frozen tower and embeddings once a
prompt, one `generate` for the whole step, the prompt's rows in one microbatch without padding to other prompts, output
layer and log-softmax at response positions only, no second forward pass.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer, GotOcr2ImageProcessorPil, InternVLForConditionalGeneration, InternVLProcessor

from benchmarks.step_cases import CASES, RESPONSES, Case, Clock, Turn, pseudo, read_prompts

BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


class ImagesOnlyProcessor(InternVLProcessor):
    """transformers' processor without one for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> object:
        """Check an argument, but for the one that is left out."""
        if argument_name == "video_processor":
            return None
        return super().check_argument_for_proper_class(argument_name, argument)


def load(work: Path, case: Case) -> tuple[InternVLForConditionalGeneration, Any, list[dict[str, Any]]]:
    """Return the model with its frozen parts, its processor, and the prompts with their images."""
    folder = work / ("demo-model" if case.configured else f"{case.model}-model-without-end")
    model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    if case.parts == "adapter":
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
    prompts = [{**prompt, "image": Image.open(prompt["image"]).convert("RGB")} for prompt in read_prompts(work, case)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = ImagesOnlyProcessor(
        GotOcr2ImageProcessorPil.from_pretrained(folder),
        tokenizer,
        None,
        image_seq_length=model.config.image_seq_length,
        chat_template=tokenizer.chat_template,
    )
    return model, processor, prompts


def messages_of(prompt: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a prompt as chat messages with its image in front."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt["text"]}]}]


def score(case: Case, responses: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return rewards: right and well-formed answers as the demo weighs them, or numbers without a meaning."""
    if not case.configured:
        return [pseudo(response) for response in responses]
    boxed = [BOXED.findall(response) for response in responses]
    return [
        (float(found[-1:] == [answer]) + 0.2 * (len(found) == 1 and "</think>" in response)) / 1.2
        for found, answer, response in zip(boxed, answers, responses, strict=True)
    ]


def never_drawn(case: Case, model: InternVLForConditionalGeneration, processor: Any) -> dict[str, object]:
    """Return the settings of `generate` that keep image tokens out of responses, and ends in a compute-matched step."""
    end = model.generation_config.eos_token_id
    ends = [processor.tokenizer.eos_token_id, *([end] if isinstance(end, int) else end)]
    return {"suppress_tokens": [model.config.image_token_id, *([] if case.configured else ends)]}


def trl_settings(case: Case, generation: Mapping[str, object], *, steps: int) -> dict[str, Any]:
    """Return the settings of GRPOConfig."""
    return {
        "per_device_train_batch_size": case.prompts * RESPONSES,
        "gradient_accumulation_steps": 1,
        "num_generations": RESPONSES,
        "max_completion_length": case.response_tokens,
        "max_steps": steps,
        "learning_rate": 1e-6,
        "beta": 0.0,
        "loss_type": "grpo",
        "temperature": 1.0,
        "generation_kwargs": dict(generation),
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "optim": "adamw_torch_fused",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def run_trl(work: Path, case: Case, *, warmup: int, steps: int) -> Turn:
    """Do steps of TRL's GRPOTrainer, all rows in one microbatch, so that it computes no old log-probs."""
    import trl
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    model, processor, prompts = load(work, case)
    clock = Clock()

    class Trainer(trl.GRPOTrainer):  # type: ignore[misc]  # no types
        def _generate(self, *args: object, **kwargs: object) -> object:
            with clock.timed("generate"):
                return super()._generate(*args, **kwargs)

        def compute_loss(self, *args: object, **kwargs: object) -> object:
            with clock.timed("forward"):
                return super().compute_loss(*args, **kwargs)

    class EndOfStep(transformers.TrainerCallback):
        whole: AbstractContextManager[None] | None = None

        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            if self.whole is None:
                self.start()

        def start(self) -> None:
            # A step also fetches its prompts, which is done before the trainer says that it begins.
            self.whole = clock.timed("step")
            self.whole.__enter__()

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            assert self.whole is not None
            self.whole.__exit__(None, None, None)
            clock.end_step()
            self.start()

    def reward(completions: list[Any], answer: list[str], **_: object) -> list[float]:
        return score(case, [completion[0]["content"] for completion in completions], answer)

    rows = [
        {"prompt": [{"role": "user", "content": prompt["text"]}], "image": prompt["image"], "answer": prompt["answer"]}
        for prompt in islice(cycle(prompts), (warmup + steps + 1) * case.prompts)
    ]
    features = Features(
        prompt=List({"role": Value("string"), "content": Value("string")}), image=ImageFeature(), answer=Value("string")
    )
    settings = trl_settings(case, never_drawn(case, model, processor), steps=warmup + steps)
    with TemporaryDirectory() as output:
        trainer = Trainer(
            model=model,
            reward_funcs=reward,
            args=trl.GRPOConfig(output_dir=output, **settings),
            train_dataset=Dataset.from_list(rows, features=features),
            processing_class=processor,
            callbacks=[EndOfStep()],
        )
        trainer.train()
    for step, logged in zip(clock.steps, trainer.state.log_history, strict=False):
        step["response_tokens"] = logged["completions/mean_length"] * case.prompts * RESPONSES
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    return Turn("trl", case.name, {**versions, **settings}, clock.steps[warmup:])


class Loop:
    """GRPO by hand."""

    def __init__(self, work: Path, case: Case) -> None:
        self.case, self.clock = case, Clock()
        self.model, self.processor, self.prompts = load(work, case)
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.trains_vision = case.parts == "all"
        self.ends = self.model.generation_config.eos_token_id
        self.pad = self.processor.tokenizer.pad_token_id

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return what the adapter reads: the tower's output without its class token, shuffled."""
        inner = self.model.model
        hidden = inner.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]
        side = int(hidden.shape[1] ** 0.5)
        shuffled = inner.pixel_shuffle(
            hidden.reshape(hidden.shape[0], side, side, -1), scale_factor=inner.config.downsample_ratio
        )
        return shuffled.reshape(hidden.shape[0], -1, shuffled.shape[-1])

    def embed(self, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of a prompt with its image in them: [1, S, H]."""
        embeddings = self.model.get_input_embeddings()(ids)
        places = (ids == self.model.config.image_token_id).unsqueeze(-1)
        return embeddings.masked_scatter(places, self.model.model.multi_modal_projector(features))

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Any], features: Sequence[torch.Tensor], *, responses: int = RESPONSES
    ) -> list[list[torch.Tensor]]:
        """Return the responses to each prompt, all of them in one batch padded on the left."""
        embedded = [self.embed(ids, part)[0] for ids, part in zip(prompts, features, strict=True)]
        longest = max(map(len, embedded))
        padded = torch.stack([torch.nn.functional.pad(part, (0, 0, longest - len(part), 0)) for part in embedded])
        mask = torch.stack([(torch.arange(longest) >= longest - len(part)).long() for part in embedded])
        self.model.eval()
        drawn = self.model.generate(
            inputs_embeds=padded.repeat_interleave(responses, 0),
            attention_mask=mask.repeat_interleave(responses, 0),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=self.case.response_tokens,
            pad_token_id=self.pad,
            **never_drawn(self.case, self.model, self.processor),
        )
        self.model.train()
        rows = [row[: self._length(row)] for row in drawn]
        return [rows[first : first + responses] for first in range(0, len(rows), responses)]

    def _length(self, row: torch.Tensor) -> int:
        ended = torch.isin(row, torch.tensor(self.ends)).nonzero()
        return int(ended[0]) + 1 if len(ended) and self.case.configured else len(row)

    def update(
        self, ids: torch.Tensor, features: torch.Tensor, responses: Sequence[torch.Tensor], advantages: torch.Tensor
    ) -> None:
        """Add the gradient of the responses to one prompt."""
        longest = max(map(len, responses))
        tokens = torch.stack(
            [torch.nn.functional.pad(row, (0, longest - len(row)), value=self.pad) for row in responses]
        )
        mask = torch.stack([torch.arange(longest) < len(row) for row in responses]).float()
        prompt = self.embed(ids, features)
        rows = torch.cat(
            [prompt.expand(len(responses), -1, -1), self.model.get_input_embeddings()(tokens[:, :-1])], dim=1
        )
        hidden = self.model.model.language_model(inputs_embeds=rows, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden[:, prompt.shape[1] - 1 :])
        log_probs = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
        ratio = (log_probs - log_probs.detach()).exp()
        objective = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
        per_row = (objective * mask).sum(1) / mask.sum(1)
        (-per_row.sum() / (self.case.prompts * RESPONSES)).backward()

    def step(self, chosen: Sequence[Mapping[str, Any]]) -> None:
        """Do one step on some prompts."""
        with self.clock.timed("step"):
            inputs = [
                self.processor(
                    text=self.processor.apply_chat_template(messages_of(prompt), add_generation_prompt=True),
                    images=[prompt["image"]],
                    return_tensors="pt",
                )
                for prompt in chosen
            ]
            with self.clock.timed("generate"):
                with torch.no_grad():
                    features = [self.features(each["pixel_values"]) for each in inputs]
                responses = self.generate([each["input_ids"] for each in inputs], features)
            with self.clock.timed("update"):
                for prompt, each, part, rows in zip(chosen, inputs, features, responses, strict=True):
                    texts = self.processor.tokenizer.batch_decode(rows)
                    rewards = torch.tensor(score(self.case, texts, [prompt["answer"]] * len(rows)))
                    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
                    again = self.features(each["pixel_values"]) if self.trains_vision else part
                    self.update(each["input_ids"], again, rows, advantages)
                torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.clock.tokens = sum(len(row) for rows in responses for row in rows)
        self.clock.end_step()


def run_loop(work: Path, case: Case, *, warmup: int, steps: int) -> Turn:
    """Do steps of the loop."""
    loop = Loop(work, case)
    prompts = cycle(loop.prompts)
    for _ in range(warmup + steps):
        loop.step(list(islice(prompts, case.prompts)))
    settings = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "attention": "sdpa",
        "microbatch": "the responses to one prompt",
        "features": "once a prompt" if not loop.trains_vision else "in generation and in the update",
        "logits": "at response positions",
        "optimizer": "AdamW, fused",
    }
    return Turn("loop", case.name, settings, loop.clock.steps[warmup:])


if __name__ == "__main__":
    folder, name, system, first, more, path = sys.argv[1:]
    run = {"trl": run_trl, "loop": run_loop}[system]
    run(Path(folder), CASES[name], warmup=int(first), steps=int(more)).write(Path(path))
