"""What the check has found: one object for programs, and lines for a reader, the last of which is the verdict."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from vllm_yocou.seams.check import is_tested, vllm_version

# Versions of torch with which exactness was measured, by device.
TESTED_TORCH = {"cpu": ("2.13",), "cuda": ("2.11",)}


@dataclass
class ModelReport:
    """Of one model: the facts in force in its engine, the figures of the comparison, and what is wrong."""

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # case or mode -> why this model does not show it
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def lines(self) -> Iterator[str]:
        took = f" ({self.seconds:.0f} s)" if self.seconds else ""
        yield f"{self.name}{took}:"
        if facts := self.facts:
            groups = ", ".join(
                f"{group['caches']} in blocks of {group['block']}"
                + (f" for W = {group['window']}" if group["window"] else "")
                for group in facts["kv_groups"]
            )
            yield (
                f"  runner {facts['runner']}, {', '.join(facts['attention_backends'])}, {facts['dtype']}, compilation "
                f"{facts['compilation_mode']}, CUDA graphs {facts['cudagraph_mode']}, "
                f"{facts['tensor_parallel_size']} rank(s)"
            )
            yield f"  {len(facts['kv_groups'])} KV groups: {groups}; {facts['kv_blocks']} blocks in all"
            yield (
                "  prompt rows skip the cross-decoder" if facts["rows_skip"] else f"  no row skips: {facts['why_not']}"
            )
        for case, largest in self.figures.get("cases", {}).items():
            yield f"  {case}: max |Δlogprob| {largest:.1e}"
        for case, reason in self.left_out.items():
            yield f"  {case}: left out, {reason}"
        for complaint in self.wrong:
            yield f"  wrong: {complaint}"


@dataclass
class Report:
    """Of the whole check; `machine` is what `vllm-yocou info` says of it."""

    machine: dict[str, Any]
    device: str
    models: list[ModelReport] = field(default_factory=list)

    @property
    def is_exact(self) -> bool:
        return bool(self.models) and not any(model.wrong for model in self.models)

    def tested(self) -> dict[str, bool]:
        torch_series = ".".join(version("torch").split(".")[:2])
        return {"vllm": is_tested(vllm_version()), "torch": torch_series in TESTED_TORCH.get(self.device, ())}

    def head(self) -> Iterator[str]:
        """Versions and machine, before the first engine starts."""
        tested = {package: "tested" if known else "not tested" for package, known in self.tested().items()}
        versions, processor = self.machine["versions"], self.machine["processor"]
        yield ", ".join(
            f"{name.replace('_', '-')} {number}" + (f" ({tested[name]})" if name in tested else "")
            for name, number in versions.items()
        )
        features = f" with {', '.join(processor['features'])}" if processor["features"] else ""
        name = processor["name"] or "an unnamed processor"
        gpus = ", ".join(self.machine["platform"]["gpus"]) or "no GPU"
        yield (
            f"device {self.device}: {gpus}; {processor['cores']} cores of {name}{features}; "
            f"{self.machine['platform']['system']}"
        )

    def verdict(self) -> str:
        if not self.is_exact:
            complaints: dict[str, list[str]] = {}
            for model in self.models:
                for complaint in model.wrong:
                    complaints.setdefault(complaint, []).append(model.name)
            wrong = [f"{' / '.join(names)}: {complaint}" for complaint, names in complaints.items()]
            return f"wrong: {'; '.join(wrong)}{self.remedy()}."
        figures = [model.figures for model in self.models]
        largest, compared = max(one["largest"] for one in figures), sum(one["compared"] for one in figures)
        reached = max(one["of_bound"] for one in figures)
        dtypes = ", ".join(dict.fromkeys(model.facts["dtype"] for model in self.models))
        return (
            f"exact: max |Δlogprob| {largest:.1e} in {compared:,} log probabilities of {len(figures)} "
            f"model{'s' if len(figures) > 1 else ''} ({dtypes}), at most {reached:.2f} of the bound."
        )

    def remedy(self) -> str:
        """For the one inexactness that has a setting."""
        served = any(model.figures and model.facts["dtype"] == "float32" for model in self.models)
        if self.device != "cuda" or not served or os.environ.get("TRITON_F32_DEFAULT") == "ieee":
            return ""
        return "; Triton multiplies float32 as TF32, set TRITON_F32_DEFAULT=ieee and a TRITON_CACHE_DIR of its own"

    def as_json(self) -> dict[str, Any]:
        """One object, in which a number that JSON does not know, such as NaN, is its name."""
        found = {
            "exact": self.is_exact,
            "verdict": self.verdict(),
            "machine": self.machine,
            "device": self.device,
            "tested": self.tested(),
            "models": [vars(model) for model in self.models],
        }
        return json.loads(json.dumps(found), parse_constant=str)
