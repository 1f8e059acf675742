"""Computes prompts for an engine in another process, which fetches their caches through NIXL.

    python -m harness.nixl_sender CHECKPOINT SETTINGS

Prompts come as one JSON line; what the other engine must be asked with goes to standard output. It ends with its input.
"""

import json
import os
import sys


def main() -> None:
    checkpoint, settings = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams

    from harness.engines import DEFAULTS, know_the_model_class

    know_the_model_class()
    llm = LLM(checkpoint, **DEFAULTS | json.loads(settings))
    wanted = SamplingParams(
        max_tokens=1, detokenize=False, extra_args={"kv_transfer_params": {"do_remote_decode": True}}
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in json.loads(sys.stdin.readline())]
    outputs = llm.generate(prompts, wanted, use_tqdm=False)
    print(json.dumps([output.kv_transfer_params for output in outputs]), file=answers, flush=True)
    sys.stdin.read()
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
