"""Batch inference over a Ray cluster: replicas of vLLM's `LLM` read JSONL or Parquet and write the same.

    python examples/inference/ray_batch.py MODEL INPUT OUTPUT --replicas 2 --engine '{"dtype": "float32"}'

INPUT is a file or folder whose rows have a unique `id` and a `prompt` (text) or `messages` (a chat). OUTPUT is a folder
that gets files of rows with `completion` and `error` added. Rows are written exactly once: Ray replaces a replica that
dies and gives its rows to another, a file appears in OUTPUT whole or not at all, and a run that was interrupted and is
started again with the same command goes on with the rows that OUTPUT lacks.

Run it anywhere in a Ray cluster; by itself it starts Ray on this machine.
"""

import argparse
import json
import os
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet
import ray
from ray.data import ActorPoolStrategy, Dataset

READERS = {".jsonl": ray.data.read_json, ".json": ray.data.read_json, ".parquet": ray.data.read_parquet}


class Replica:
    """One engine; Ray Data keeps it for as long as there are rows."""

    def __init__(self, model: str, engine: dict, sampling: dict):
        # The engine runs in this process, so that neither outlives the other and Ray sees its end.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM, SamplingParams
        from vllm.exceptions import VLLMClientError

        self.llm = LLM(model, **engine)
        self.sampling = SamplingParams(**sampling)
        self.refusals = (VLLMClientError, ValueError, TypeError)

    def __call__(self, batch: pa.Table) -> pa.Table:
        answers = self.answers(batch)
        for column in ("completion", "error"):
            texts = [answer.get(column) for answer in answers]
            batch = batch.append_column(column, pa.array(texts, pa.string()))
        return batch

    def answers(self, batch: pa.Table) -> list[dict[str, str]]:
        """A completion for each row, or the reason why vLLM refuses its prompt."""
        chat = "messages" in batch.column_names
        generate = self.llm.chat if chat else self.llm.generate
        inputs = batch["messages" if chat else "prompt"].to_pylist()

        def completions(inputs: list) -> list[dict[str, str]]:
            outputs = generate(inputs, self.sampling, use_tqdm=False)
            return [{"completion": output.outputs[0].text} for output in outputs]

        try:
            return completions(inputs)
        except self.refusals:  # vLLM refuses a whole call if it refuses one of its prompts
            answers = []
            for one in inputs:
                try:
                    answers += completions([one])
                except self.refusals as refusal:
                    answers.append({"error": str(refusal)})
            return answers


def refuse(sentence: str) -> NoReturn:
    print(f"ray_batch: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(2)


def read(source: Path) -> tuple[Dataset, str]:
    """The rows of a file or folder and their format; refuses rows that lack what they must have."""
    files = list(source.iterdir()) if source.is_dir() else [source] * source.exists()
    formats = {file.suffix for file in files if file.suffix in READERS and not file.name.startswith(".")}
    if len(formats) != 1:
        refuse(f"{source} must be a file of JSON lines or Parquet (.jsonl, .json, .parquet), or a folder of one kind.")
    (kind,) = formats
    try:
        rows = READERS[kind](str(source))
        schema = rows.schema()
        names = schema.names if schema is not None else []
        dates = [name for name in names if pa.types.is_timestamp(schema.base_schema.field(name).type)]
        if dates and kind != ".parquet":  # text that looks like a date is text
            texts = pa.schema([(name, pa.string()) for name in dates])
            rows = READERS[kind](str(source), parse_options=pa.json.ParseOptions(explicit_schema=texts))
        total, distinct = rows.count(), len(rows.unique("id")) if "id" in names else 0
    except Exception as error:  # whatever Ray and Arrow raise for a file that is cut short or not what its name says
        refuse(f"{source} cannot be read: {str(error).splitlines()[0]}")
    if "id" not in names or not {"prompt", "messages"} & set(names):
        listed = ", ".join(sorted(names)) or "no columns"
        refuse(f"the rows of {source} have {listed}: they need id, and prompt or messages.")
    if taken := {"completion", "error"} & set(names):
        refuse(
            f"the rows of {source} have {', '.join(sorted(taken))}, which answers are written to: rename or drop it."
        )
    if total != distinct:
        refuse(f"{source} has {total} rows and {distinct} ids: a row is known by its id, make each one's its own.")
    return rows, kind


def finished(output: Path, kind: str) -> set:
    """The ids of the rows that OUTPUT has."""
    parts = sorted(output.glob(f"*{kind}"))
    if kind == ".parquet":
        return {id for part in parts for id in pa.parquet.read_table(part, columns=["id"])["id"].to_pylist()}
    return {json.loads(line)["id"] for part in parts for line in part.read_text().splitlines()}


def write(rows: pa.Table, part: Path) -> None:
    """Write a file that appears whole or not at all."""
    unfinished = part.with_name(f".{part.name}.unfinished")
    if part.suffix == ".parquet":
        pa.parquet.write_table(rows, unfinished)
    else:
        unfinished.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows.to_pylist()))
    os.replace(unfinished, part)


def check_resources(replicas: int, needs: dict[str, float]) -> None:
    """Refuse resources that no machine has; Ray would wait forever."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    needs = {kind: each for kind, each in needs.items() if each}
    room = sum(
        min((int(machine.get(kind, 0) // each) for kind, each in needs.items()), default=0) for machine in machines
    )
    wanted = ", ".join(f"{each:g} {kind}s" for kind, each in needs.items())
    if needs and room < replicas:
        refuse(f"the cluster has room for {room} replicas of {wanted}, not for {replicas}: ask for less.")
    cpus = sum(machine.get("CPU", 0) for machine in machines)
    if cpus - replicas * needs.get("CPU", 0) < 1:
        refuse(f"{replicas} replicas of {wanted} leave none of the cluster's {cpus:g} CPUs to read: ask for less.")


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def json_object(text: str) -> dict:
    if not isinstance(found := json.loads(text), dict):
        raise ValueError
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder, on every machine of the cluster, or a name on the hub")
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--replicas", type=positive, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="of each replica; 0 on CPUs")
    parser.add_argument("--cpus", type=float, default=1, help="of each replica, as Ray counts them")
    parser.add_argument("--batch", type=positive, default=256, help="rows a replica gets at a time")
    parser.add_argument("--max-tokens", type=positive, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--engine", type=json_object, default={}, help="arguments of vLLM's LLM, as JSON")
    arguments = parser.parse_args()
    try:
        answer(arguments)
    except KeyboardInterrupt:
        refuse("interrupted: the same command goes on with the rest.")
    except (ray.exceptions.RayError, OSError) as error:
        reason = str(error).rpartition("Error: ")[2]  # Ray's message is the whole traceback of a replica
        refuse(f"the run ended, the same command goes on with the rest once this is mended: {reason[:300]}")


def answer(arguments: argparse.Namespace) -> None:
    """Answer the rows that OUTPUT lacks."""
    ray.init(log_to_driver=False)
    check_resources(arguments.replicas, {"CPU": arguments.cpus, "GPU": arguments.gpus})
    source, output = arguments.input.resolve(), arguments.output.resolve()
    if source == output or source in output.parents:
        refuse(f"{arguments.output} lies in {arguments.input}, so answers would be read as questions: choose another.")
    rows, kind = read(arguments.input)
    arguments.output.mkdir(parents=True, exist_ok=True)
    done, total = finished(arguments.output, kind), rows.count()
    print(f"{len(done)} of {total} rows are in {arguments.output}.", flush=True)

    def unanswered(batch: pa.Table) -> pa.Table:
        return batch.filter(pa.array([id not in done for id in batch["id"].to_pylist()], pa.bool_()))

    # Each batch is a block, so that what a replica has finished is written and survives an interruption.
    rest = rows.map_batches(unanswered, batch_format="pyarrow").repartition(target_num_rows_per_block=arguments.batch)
    completed = rest.map_batches(
        Replica,
        fn_constructor_args=(
            arguments.model,
            arguments.engine,
            {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature},
        ),
        compute=ActorPoolStrategy(size=arguments.replicas),
        batch_size=arguments.batch,
        batch_format="pyarrow",
        num_cpus=arguments.cpus,
        num_gpus=arguments.gpus,
    )
    run, refused = uuid.uuid4().hex[:8], 0  # no file of another run is overwritten
    parts: Iterable[pa.Table] = completed.iter_batches(batch_size=None, batch_format="pyarrow")
    for number, part in enumerate(parts):
        if part.num_rows:
            refused += part.num_rows - part["error"].null_count
            write(part, arguments.output / f"part-{run}-{number:06}{kind}")
    print(f"{len(finished(arguments.output, kind))} of {total} rows are in {arguments.output}.")
    if refused:
        print(f"{refused} of this run have an error instead of a completion: delete those rows to try them again.")


if __name__ == "__main__":
    main()
