"""Run a checkpoint on two ranks and print what it generated; test_tensor_parallel.py starts it."""

import json
import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    prompts = json.load(sys.stdin)
    llm = LLM(
        sys.argv[1],
        skip_tokenizer_init=True,
        dtype="float32",
        tensor_parallel_size=2,
        max_model_len=512,
        max_num_batched_tokens=61,
        max_num_seqs=8,
        kv_cache_memory_bytes=32 << 20,
        disable_custom_all_reduce=True,
    )
    greedy = dict(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    parameters = SamplingParams(logprobs=5, prompt_logprobs=2, **greedy)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)

    def plain(logprobs):
        return None if logprobs is None else {token: entry.logprob for token, entry in logprobs.items()}

    result = [
        {
            "token_ids": list(output.outputs[0].token_ids),
            "logprobs": [plain(entry) for entry in output.outputs[0].logprobs],
            "prompt_logprobs": [plain(entry) for entry in output.prompt_logprobs],
        }
        for output in outputs
    ]
    print("RESULT", json.dumps(result))
