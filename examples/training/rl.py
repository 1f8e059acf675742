"""Reinforcement learning with vLLM in the loop: the trained model learns to write short sentences.

    python examples/training/rl.py
    python examples/training/rl.py --steps 30 --output /tmp/short

A step samples verses from vLLM, scores them by a rule, takes a policy-gradient step on the reference model, and sends
the new weights to the running engine in buckets. The rule stands in `reward`: 1 for a verse that ends with a full stop
before its tokens run out, else 0. There is no reward model.

The engine's own log probabilities are the denominators of the importance ratios. The table shows for each step

    reward       the share of sampled verses that follow the rule
    KL           of the trainer from the engine, in nats per token: how far the two disagree about the same weights
    ratio        the largest importance ratio of a token, or its inverse where that is larger
    drift        how much likelier the samples were than at the start: nearly KL from it, in nats per token
    seconds      for sampling, for the gradient, and for sending weights

The weights go through vLLM's weight-transfer API, in which bucket_transfer.py registers a transfer that needs no GPU.
On GPUs, one of vLLM's own takes its place, with the engine in a process of its own: the backend "nccl" for the engine,
vLLM's NCCLTrainerInitInfo in place of BucketInit, and the same `send_weights()`. Where trainer and engine share a GPU,
it is "ipc" and IPCTrainerInitInfo.

vLLM labels weights as it is told to and puts the labels into each output (`weight_versions`); this program refuses
samples of any label but the newest. vLLM keeps the prefix cache over an update, so the cache is reset here: a hit would
mix keys and values of old weights into new answers. This program updates between steps, when no request is under way. A
server is asked to pause first, with `POST /pause?mode=wait` to let requests finish, or with `abort` or `keep`.

With a seed, a run can be repeated: the engine lives in this process, where requests reach it in a fixed order.
"""

import argparse
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# Before vLLM is imported: an engine in a process of its own batches requests as they happen to come.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import bucket_transfer
import corpus
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from vllm import LLM, RequestOutput, SamplingParams
from vllm.inputs import TokensPrompt

from vllm_yocou.checkpoints.write import copy_companions
from vllm_yocou.reference import YocoUForCausalLM

TRAINED = Path(__file__).parents[1] / "yoco-u-kjv"
CLIP = 0.2  # a token whose importance ratio has left 1 +- CLIP is not pushed further
ROWS = 32  # that the trainer computes at a time


def refuse(reason: str) -> NoReturn:
    print(f"rl.py: {reason}", file=sys.stderr)
    sys.exit(2)


def reward(verse: str, is_finished: bool) -> float:
    """1 for a verse that was finished and ends with a full stop, else 0."""
    return float(is_finished and verse.endswith("."))


@dataclass
class Samples:
    """N sampled verses, padded to the longest.

    ids (N, prompt + verse), int64. Of shape (N, prompt + verse - 1), about the token that follows at each place:
    is_sampled, bool; logprobs, float32, the engine's, 0 where it has sampled nothing. rewards (N,), float32;
    advantages (N,), float32, of a verse over the others of its prompt.
    """

    ids: torch.Tensor
    is_sampled: torch.Tensor
    logprobs: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor
    texts: list[str]


def score(outputs: list[RequestOutput], version: str) -> Samples:
    """Samples of vLLM's outputs; each has at least two verses, all of the weights called `version`."""
    ids, logprobs, starts, rewards = [], [], [], []
    for output in outputs:
        for verse in output.outputs:
            served_by = {span.version for span in verse.weight_versions or ()}
            if served_by != {version}:
                raise RuntimeError(f"a verse was sampled with the weights {served_by}, not with {version!r}.")
            prompt = output.prompt_token_ids or []
            ids.append(torch.tensor([*prompt, *verse.token_ids]))
            rows: Any = verse.logprobs  # asked for
            sampled = [row[token].logprob for token, row in zip(verse.token_ids, rows, strict=True)]
            logprobs.append(torch.tensor([0.0] * (len(prompt) - 1) + sampled))
            starts.append(len(prompt) - 1)
            rewards.append(reward(verse.text, verse.finish_reason == "stop"))
    grouped = torch.tensor(rewards).view(len(outputs), -1)
    others = (grouped.sum(1, keepdim=True) - grouped) / (grouped.shape[1] - 1)
    is_sampled = [torch.arange(len(row)) >= start for row, start in zip(logprobs, starts, strict=True)]
    padded_ids, padded_mask, padded_logprobs = (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (ids, is_sampled, logprobs)
    )
    texts = [verse.text for output in outputs for verse in output.outputs]
    return Samples(padded_ids, padded_mask, padded_logprobs, grouped.flatten(), (grouped - others).flatten(), texts)


def logprobs(model: YocoUForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Of each token but the first of (N, tokens) ids: (N, tokens - 1), float32. Padding comes last and changes none."""
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


@torch.no_grad()
def drift(start: YocoUForCausalLM, samples: Samples) -> float:
    """How much likelier the sampled tokens were than at the start, in nats per token."""
    first = torch.cat([logprobs(start, ids) for ids in samples.ids.split(ROWS)])
    return (samples.logprobs - first)[samples.is_sampled].mean().item()


def improve(
    model: YocoUForCausalLM, optimizer: torch.optim.Optimizer, samples: Samples, passes: int
) -> tuple[float, float]:
    """Take `passes` clipped policy-gradient steps over all samples, with ratios over the engine's probabilities.

    Returns:
        What the trainer thought before the first of them: its KL from the engine and the largest importance ratio.
    """
    differences = []
    for taken in range(passes):
        for rows in torch.arange(len(samples.ids)).split(ROWS):
            difference = logprobs(model, samples.ids[rows]) - samples.logprobs[rows]
            if not taken:
                differences.append(difference.detach()[samples.is_sampled[rows]])
            ratio, advantages = difference.exp(), samples.advantages[rows, None]
            gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
            (-(gain * samples.is_sampled[rows]).sum() / len(samples.ids)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    before = torch.cat(differences)
    # Each term is 0 or more, and their expectation over the engine's samples is the divergence.
    divergence = (before.exp() * before - before.exp() + 1).mean()
    return divergence.item(), before.abs().max().exp().item()


def prompts(tokenizer: PreTrainedTokenizerBase, number: int, chooser: random.Random) -> list[list[int]]:
    """Titles of chapters, after which the model writes the first verse."""
    titles = [f"{book} {chooser.randint(1, 20)}\n" for book in chooser.sample(corpus.BOOKS, number)]
    return [[tokenizer.bos_token_id, *tokenizer.encode(title, add_special_tokens=False)] for title in titles]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TRAINED, help="folder of the checkpoint to start from")
    parser.add_argument("--output", type=Path, help="folder of the checkpoint to write, none without it")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=8, help=f"of a step, at most {len(corpus.BOOKS)}")
    parser.add_argument("--verses", type=int, default=8, help="samples for each prompt, at least 2")
    parser.add_argument("--tokens", type=int, default=24, help="most tokens of a verse")
    parser.add_argument("--passes", type=int, default=2, help="over the samples of a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--bucket-bytes", type=int, default=4 << 20, help="of weights that are sent at a time")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.verses < 2 or not 0 < arguments.prompts <= len(corpus.BOOKS):
        refuse(f"a step needs --prompts from 1 to {len(corpus.BOOKS)} and at least 2 --verses for each: change them.")
    return arguments


def learn(arguments: argparse.Namespace) -> list[float]:
    """The rewards of all steps, each printed as it comes."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    (newline,) = tokenizer.encode("\n", add_special_tokens=False)
    llm = LLM(
        str(arguments.model),
        dtype="float32",
        seed=arguments.seed,
        enforce_eager=True,
        kv_cache_memory_bytes=128 << 20,
        max_num_batched_tokens=512,
        max_num_seqs=128,
        weight_transfer_config={"backend": bucket_transfer.BACKEND},
    )
    model, start = (YocoUForCausalLM.from_pretrained(arguments.model, dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.Adam(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95))
    sender = bucket_transfer.sender(model, bucket_transfer.OfflineClient(llm), bucket_bytes=arguments.bucket_bytes)
    parameters = SamplingParams(
        n=arguments.verses, temperature=1, max_tokens=arguments.tokens, stop_token_ids=[newline], logprobs=0
    )
    chooser = random.Random(arguments.seed)
    rewards: list[float] = []
    examples: list[str] = []
    version = llm.get_weight_version()
    print("step  reward       KL    ratio   drift   seconds: sampling, gradient, weights")
    for step in range(arguments.steps):
        begin = time.perf_counter()
        asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts(tokenizer, arguments.prompts, chooser)]
        samples = score(llm.generate(asked, parameters, use_tqdm=False), version)
        sampled = time.perf_counter()
        away = drift(start, samples)
        divergence, ratio = improve(model, optimizer, samples, arguments.passes)
        improved = time.perf_counter()
        version = f"step {step + 1}"
        bucket_transfer.renew(sender, llm, version)
        sent = time.perf_counter()
        rewards.append(samples.rewards.mean().item())
        examples.append(samples.texts[0])
        print(
            f"{step:4d}  {rewards[-1]:6.3f}  {divergence:7.1e}  {ratio:7.5f}  {away:6.3f}"
            f"   {sampled - begin:17.1f}  {improved - sampled:8.1f}  {sent - improved:7.2f}",
            flush=True,
        )
    if arguments.output:
        model.save_pretrained(arguments.output)
        copy_companions(arguments.model, arguments.output)
    print(f"a verse of the first step: {examples[0]!r}, and of the last: {examples[-1]!r}")
    return rewards


def main() -> None:
    arguments = parse()
    begin = time.perf_counter()
    rewards = learn(arguments)
    last = rewards[-3:]
    mean, seconds = sum(last) / len(last), time.perf_counter() - begin
    print(f"reward: {rewards[0]:.3f} at the first step, {mean:.3f} over the last {len(last)}; {seconds:.0f} s in all")


if __name__ == "__main__":
    main()
