"""How far the reference model, which is what one trains, is from the served model that samples its answers.

Both have the same weights in the same dtype. Answers are sampled at temperature 1, and the reference model computes the
same tokens in one pass. What is estimated is KL(trainer ‖ server), the mean over the server's own tokens of
r·log(r) - (r - 1) for r = p_trainer(token) / p_server(token): its terms are never negative and it is unbiased.

For mixtures the experts that the server chose are read off its routers, and the reference model also computes the
answers with those experts instead of its own.
"""

from benchmarks.engine import config, runner

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from vllm import LLM, SamplingParams
from vllm.forward_context import get_forward_context
from vllm.inputs import TokensPrompt

from benchmarks.console import progress, publish
from benchmarks.results import ROOT, Result
from vllm_yocou.config import YocoUConfig
from vllm_yocou.reference import YocoUForCausalLM
from vllm_yocou.reference.feed_forward import MoE

TRAINED = ROOT / "examples" / "yoco-u-kjv"
TEXT = ROOT / "examples" / "evaluation" / "kjv_last_word.jsonl"
DTYPES = ("float32", "bfloat16")
ANSWERS, PROMPT, TOKENS = 64, 16, 128
TOGETHER = 16  # answers that the reference model computes in one pass
SHAPES: dict[str, dict[str, Any]] = {
    "57M width": dict(shape="57M"),
    "small mixture": dict(
        shape="yoco-u-kjv",
        vocab_size=1024,
        hidden_size=128,
        num_hidden_layers=4,
        num_self_decoder_layers=2,
        num_iterations=2,
        num_attention_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        shared_expert_gate=False,
    ),
}


class Answers(NamedTuple):
    """A answers of N tokens after prompts of P tokens.

    Attributes:
        tokens: (A, P + N) int64, prompts and answers.
        served: (A, N) float32, the server's log probabilities of the answers' tokens.
        experts: (A, P + N - 1, T·S + C, k) int64, what each row was routed to in each pass through a layer, -1 where it
            skipped the layer; None for a dense model.
    """

    tokens: torch.Tensor
    served: torch.Tensor
    experts: torch.Tensor | None


class Deviation(NamedTuple):
    """KL in nats, and the largest |r - 1| of a token."""

    kl: float
    largest: float


def random_weights(cfg: YocoUConfig, dtype: torch.dtype, folder: Path) -> None:
    torch.manual_seed(0)
    model = YocoUForCausalLM(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # So large that every layer moves the logits, and that these prefer some tokens.
                parameter.normal_(std=cfg.hidden_size**-0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(folder)


def prompts_of_text() -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TRAINED)
    lines = TEXT.read_text().splitlines()[:ANSWERS]
    return [tokenizer(json.loads(line)["context"])["input_ids"][:PROMPT] for line in lines]


def random_prompts(cfg: YocoUConfig) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, cfg.vocab_size, (ANSWERS, PROMPT), generator=generator).tolist()


class Routes:
    """Notes which experts the rows of each request are routed to while an engine of this process runs."""

    def __init__(self, llm: LLM):
        self.runner = runner(llm)
        self.model = self.runner.model.model
        cfg = cast(YocoUConfig, llm.model_config.hf_config)
        self.looped, self.crossing = cfg.num_self_decoder_layers, cfg.num_cross_decoder_layers
        self.passes = cfg.num_iterations * self.looped + self.crossing
        self.k = cast(int, cfg.num_experts_per_tok)
        self.step: dict[tuple[bool, int], list[torch.Tensor]] = {}
        self.of_request: dict[str, list[torch.Tensor]] = {}

    def note(self, place: tuple[bool, int], chosen_Nk: torch.Tensor) -> None:
        self.step.setdefault(place, []).append(chosen_Nk.clone())

    @contextmanager
    def noted(self) -> Iterator["Routes"]:
        for is_cross, decoder in enumerate((self.model.self_decoder, self.model.cross_decoder)):
            for i, layer in enumerate(decoder.layers):
                layer.mlp.experts.router.set_capture_fn(partial(self.note, (bool(is_cross), i)))
        computed = self.model.forward

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.step.clear()
            out_ND = computed(*args, **kwargs)
            if get_forward_context().attn_metadata is not None:
                self.sort(len(out_ND))
            return out_ND

        self.model.forward = forward
        try:
            yield self
        finally:
            del self.model.forward

    def sort(self, rows: int) -> None:
        """Give the step's rows to their requests."""
        step_NPk = torch.full((rows, self.passes, self.k), -1)
        skipping = self.model.global_kv.cache.step_rows()
        for (is_cross, i), chosen in self.step.items():
            if is_cross:
                step_NPk[slice(None) if skipping is None else skipping.rows_M, i - self.crossing] = chosen[0].long()
            else:
                for iteration, chosen_Nk in enumerate(chosen):
                    step_NPk[:, iteration * self.looped + i] = chosen_Nk.long()
        requests = self.runner.input_batch.req_ids
        starts = self.runner.query_start_loc.np[: len(requests) + 1].tolist()
        for request, start_row, end in zip(requests, starts, starts[1:], strict=False):
            self.of_request.setdefault(request, []).append(step_NPk[start_row:end])

    def of_answers(self) -> torch.Tensor:
        """(A, P + N - 1, passes, k), by the order in which the requests came."""
        return torch.stack([torch.cat(steps) for steps in self.of_request.values()])


def sampled(llm: LLM, prompts: list[list[int]]) -> Answers:
    """Answers to prompts of one length, by the engine's own seed."""
    parameters = SamplingParams(temperature=1, max_tokens=TOKENS, ignore_eos=True, logprobs=0, detokenize=False)
    inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    if llm.model_config.hf_config.is_moe:
        with Routes(llm).noted() as routes:
            outputs = llm.generate(inputs, parameters, use_tqdm=False)
        experts = routes.of_answers()
    else:
        outputs, experts = llm.generate(inputs, parameters, use_tqdm=False), None
    completions: list[Any] = [output.outputs[0] for output in outputs]
    tokens = [[*prompt, *completion.token_ids] for prompt, completion in zip(prompts, completions, strict=True)]
    served = [
        [entries[token].logprob for token, entries in zip(one.token_ids, one.logprobs, strict=True)]
        for one in completions
    ]
    return Answers(torch.tensor(tokens), torch.tensor(served), experts)


def served(folder: Path, dtype: str, prompts: list[list[int]], **settings: Any) -> Answers:
    """By an engine that is gone afterwards."""
    common: dict[str, Any] = dict(skip_tokenizer_init=True, enforce_eager=True, kv_cache_memory_bytes=512 << 20)
    common |= dict(max_model_len=2 * (PROMPT + TOKENS), max_num_seqs=len(prompts))
    llm = LLM(str(folder), **dict(dtype=dtype) | common | settings)
    answers = sampled(llm, prompts)
    llm.llm_engine.engine_core.shutdown()
    return answers


class Trainer:
    """The reference model in the dtype that is served."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        self.model = YocoUForCausalLM.from_pretrained(str(folder), dtype=dtype).eval()

    @torch.inference_mode()
    def computed(self, answers: Answers, replay: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log probabilities (A, N) of the answers' tokens, with the server's experts if `replay`, and its own experts.

        These are as those of `Answers` are, and no less than 0.
        """
        log_AN, chosen = [], []
        for first in range(0, len(answers.tokens), TOGETHER):
            batch = slice(first, first + TOGETHER)
            tokens_BN, routed = answers.tokens[batch], None
            if replay and answers.experts is not None:
                routed = answers.experts[batch]
            with self.routes() as noted:
                out = self.model(tokens_BN[:, :-1], routed_experts=routed, logits_to_keep=answers.served.shape[1])
            log_BNV = out.logits.float().log_softmax(-1)
            log_AN.append(log_BNV.gather(-1, tokens_BN[:, -log_BNV.shape[1] :, None])[..., 0])
            if noted:
                chosen.append(torch.stack([one.unflatten(0, (len(tokens_BN), -1)) for one in noted], dim=2))
        return torch.cat(log_AN), torch.cat(chosen) if chosen else None

    @contextmanager
    def routes(self) -> Iterator[list[torch.Tensor]]:
        """A list that gets (B · N, k), the experts of each pass through a layer that has some."""
        noted: list[torch.Tensor] = []

        def note(module: MoE, inputs: tuple[torch.Tensor, ...], out_BND: torch.Tensor) -> None:
            noted.append(module.gate(inputs[0].flatten(0, -2)).topk(module.top_k).indices)

        hooks = [module.register_forward_hook(note) for module in self.model.modules() if isinstance(module, MoE)]
        try:
            yield noted
        finally:
            for hook in hooks:
                hook.remove()


def deviation(trainer: torch.Tensor, server: torch.Tensor) -> Deviation:
    """Of log probabilities that both give the tokens which the server has sampled."""
    log_r = trainer.double() - server.double()
    r = log_r.exp()
    return Deviation((r * log_r - (r - 1)).mean().item(), (r - 1).abs().max().item())


def differing(own: torch.Tensor, served: torch.Tensor, tokens: int) -> float:
    """The share of sampled tokens any of whose sets of experts differ."""
    differ = (own.sort().values != served.sort().values).any(-1) & (served >= 0).all(-1)
    return differ.any(-1)[:, -tokens:].float().mean().item()


def measure(**settings: Any) -> Result:
    """`settings` apply to every engine, in addition to the table's own."""
    result = Result.here("trainer_kl", answers=ANSWERS, prompt=PROMPT, tokens=TOKENS)
    for name in ("trained example", *SHAPES):
        for dtype in DTYPES:
            progress(f"{name}, {dtype}")
            with tempfile.TemporaryDirectory(prefix="yocou-bench-") as made:
                cfg = YocoUConfig.from_pretrained(TRAINED) if name not in SHAPES else config(**SHAPES[name])
                folder = TRAINED if name not in SHAPES else Path(made)
                if name in SHAPES:
                    random_weights(cfg, getattr(torch, dtype), folder)
                prompts = random_prompts(cfg) if name in SHAPES else prompts_of_text()
                answers = served(folder, dtype, prompts, **settings)
                trainer = Trainer(folder, getattr(torch, dtype))
            of = dict(model=name, dtype=dtype)
            own, experts = trainer.computed(answers)
            add(result, deviation(own, answers.served), routing="own", **of)
            if experts is not None and answers.experts is not None:
                share = differing(experts, answers.experts, TOKENS)
                result.add("tokens with other experts", "", share, **of)
                replayed, _ = trainer.computed(answers, replay=True)
                add(result, deviation(replayed, answers.served), routing="replayed", **of)
    return result


def add(result: Result, found: Deviation, **of: str) -> None:
    result.add("KL", "nats", found.kl, **of)
    result.add("largest |r - 1|", "", found.largest, **of)


if __name__ == "__main__":
    publish(measure())
