"""How long users wait near saturation: `vllm bench serve` at a fixed rate, rows skipping or not, by size of chunks.

In the quickest type of the processor alone: in float32 two cores would take more than two hours.
"""

from benchmarks.engine import config

import json
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.bench_serve import asked, tokenized
from benchmarks.console import progress, publish
from benchmarks.precision import dtypes_here
from benchmarks.results import Result
from benchmarks.server import VLLM, Server, serving
from benchmarks.tables.tail_latency import EVERY_ROW, PERCENTILES, WAYS

SHAPE = "57M"
PROMPT, ANSWER = 1200, 200  # tokens
LOAD = 0.8  # of the requests a second that the server that runs every row answers if it has all of them at once
SATURATING = 24  # requests
REQUESTS, ROUNDS, WARM_UP = 100, 3, 4
CHUNKS = (512, 1024, 2048)
LIMIT_S = 3 * 3600  # of a server, which must outlive the runs against all servers
SETTINGS = "--load-format dummy --max-model-len 2048 --host 127.0.0.1"
SETTINGS += " --kv-cache-memory-bytes 1G --gpu-memory-utilization 0.1 --max-num-seqs 32 --no-enable-prefix-caching"


@dataclass
class Waits:
    """What the users of one server waited for, in seconds, over all rounds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens_s: list[float] = field(default_factory=list)

    def ask(self, server: Server, folder: Path, seed: int, requests: int, rate: str) -> None:
        mix = f"--random-input-len {PROMPT} --random-output-len {ANSWER} --request-rate {rate} --seed {seed}"
        found = asked(server, folder, requests, mix, timeout_s=1800)
        self.first += found["ttfts"]
        self.between += [seconds for request in found["itls"] for seconds in request]
        self.tokens_s.append(found["output_throughput"])


def measure(dtype: str = "float32") -> Result:
    result = Result.here(
        "tail_latency",
        shape=SHAPE,
        dtype=dtype,
        prompt=PROMPT,
        answer=ANSWER,
        load=LOAD,
        requests=REQUESTS,
        rounds=ROUNDS,
    )
    cases = [(chunk, way) for chunk in CHUNKS for way in WAYS]
    waits = {case: Waits() for case in cases}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        checkpoint = tokenized(folder / "checkpoint", config(SHAPE))
        servers = {}
        for chunk, way in cases:
            progress(f"starting: chunks of {chunk}, {way}")
            command = [VLLM, "serve", str(checkpoint), "--dtype", dtype, *SETTINGS.split()]
            command += ["--max-num-batched-tokens", str(chunk)]
            command += ["--additional-config", json.dumps({"yocou": {"skip_rows": WAYS[way]}})]
            log = folder / f"{chunk}-{WAYS[way]}.log"
            servers[chunk, way] = stack.enter_context(serving(command, log, limit_s=LIMIT_S))
            Waits().ask(servers[chunk, way], folder, ROUNDS, WARM_UP, "inf")
        most = Waits()
        most.ask(servers[CHUNKS[len(CHUNKS) // 2], EVERY_ROW], folder, ROUNDS, SATURATING, "inf")
        rate = round(LOAD * most.tokens_s[0] / ANSWER, 3)
        for seed in range(ROUNDS):
            for case, server in servers.items():
                progress(f"chunks of {case[0]}, {case[1]}, round {seed + 1} of {ROUNDS}")
                waits[case].ask(server, folder, seed, REQUESTS, str(rate))
    for (chunk, way), found in waits.items():
        for what, seconds in (("first token", found.first), ("between tokens", found.between)):
            of_hundred = statistics.quantiles(seconds, n=100)
            for percentile in PERCENTILES:
                result.add(f"{what}, p{percentile}", "s", of_hundred[percentile - 1], chunk=chunk, way=way)
        result.add("answers", "1/s", found.tokens_s, chunk=chunk, way=way)
        result.add("requests", "1/s", rate, chunk=chunk, way=way)
    return result


if __name__ == "__main__":
    publish(measure(dtypes_here()[-1]))
