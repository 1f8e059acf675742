"""Batch inference over a Ray cluster: replicas of vLLM's `LLM` read JSONL or Parquet and write the same.

    python examples/ray_batch.py MODEL INPUT OUTPUT --replicas 2 --max-tokens 64 --engine '{"dtype": "float32"}'

INPUT is a file or folder whose rows have a unique `id` and a `prompt` (text) or `messages` (a chat). OUTPUT is a folder
that gets files of rows with `completion` and `error` added. Rows are written exactly once: Ray replaces a replica that
dies and gives its rows to another, and a run that was interrupted, started again with the same command, goes on with
the rows that are not in OUTPUT yet (Ray Data's checkpoints, kept in OUTPUT-checkpoint).

Run it anywhere in a Ray cluster; by itself it starts Ray on this machine.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data.checkpoint import CheckpointConfig

READERS = {".jsonl": ray.data.read_json, ".parquet": ray.data.read_parquet}


class Replica:
    """One engine; Ray Data keeps it for as long as there are rows."""

    def __init__(self, model: str, engine: dict, sampling: dict):
        from vllm import LLM, SamplingParams

        self.llm = LLM(model, **engine)
        self.sampling = SamplingParams(**sampling)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if "messages" in batch:
            generate = self.llm.chat
            inputs = [[dict(message) for message in messages] for messages in batch["messages"]]
        else:
            generate, inputs = self.llm.generate, batch["prompt"].tolist()
        completions, errors = [], []
        try:
            outputs = generate(inputs, self.sampling, use_tqdm=False)
            completions, errors = [output.outputs[0].text for output in outputs], [None] * len(outputs)
        except ValueError:  # vLLM refuses a call whole if it refuses one of its prompts
            for one in inputs:
                completion, error = None, None
                try:
                    completion = generate([one], self.sampling, use_tqdm=False)[0].outputs[0].text
                except ValueError as refusal:
                    error = str(refusal)
                completions.append(completion)
                errors.append(error)
        return batch | {"completion": np.array(completions, object), "error": np.array(errors, object)}


def read(source: Path) -> tuple[Dataset, str]:
    """The rows of a file or folder, and their format, after a look at what they must have."""
    formats = {file.suffix for file in (source.iterdir() if source.is_dir() else [source]) if file.suffix in READERS}
    if not source.exists() or len(formats) != 1:
        sys.exit(f"{source} must be one .jsonl or .parquet file, or a folder of one of the two kinds.")
    (kind,) = formats
    rows = READERS[kind](str(source))
    columns = set(rows.schema().names)
    if "id" not in columns or not columns & {"prompt", "messages"}:
        sys.exit(f"the rows of {source} have {', '.join(sorted(columns))}: they need id, and prompt or messages.")
    total, distinct = rows.count(), len(rows.unique("id"))
    if total != distinct:
        sys.exit(f"{source} has {total} rows and {distinct} ids: a row is known by its id, make each one's its own.")
    return rows, kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder, on every machine of the cluster, or a name on the hub")
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="of each replica; 0 on CPUs")
    parser.add_argument("--cpus", type=float, default=1, help="of each replica, as Ray counts them")
    parser.add_argument("--batch", type=int, default=256, help="rows a replica gets at a time")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--engine", type=json.loads, default={}, help="arguments of vLLM's LLM, as JSON")
    arguments = parser.parse_args()

    ray.init(log_to_driver=False)
    rows, kind = read(arguments.input.absolute())
    output = arguments.output.absolute()
    # A checkpoint is only deleted with what it speaks of: started once more, a finished run has nothing to do.
    DataContext.get_current().checkpoint_config = CheckpointConfig(
        "id", f"{output}-checkpoint", delete_checkpoint_on_success=False
    )
    rows, _ = read(arguments.input.absolute())
    completed = rows.map_batches(
        Replica,
        fn_constructor_args=(
            arguments.model,
            arguments.engine,
            {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature},
        ),
        compute=ActorPoolStrategy(size=arguments.replicas),
        batch_size=arguments.batch,
        num_cpus=arguments.cpus,
        num_gpus=arguments.gpus,
    )
    write = completed.write_json if kind == ".jsonl" else completed.write_parquet
    write(str(output))
    print(f"{output}: done.")


if __name__ == "__main__":
    main()
