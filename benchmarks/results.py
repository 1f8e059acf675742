"""A `Result` is one table's measurement on one machine, with the value of every run: all that rendering needs.

It is kept as results/<machine>/<table>.json. The tables and pictures of the pages are rendered from these files.
"""

import json
import re
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "results"
DIGITS = 9  # significant ones of a stored value

Key = str | int


@dataclass(frozen=True)
class Measurement:
    """The runs of one quantity: `name` and `unit` say what it is, `of` what of the table it belongs to."""

    name: str
    unit: str
    of: dict[str, Key]
    runs: list[float]


@dataclass
class Result:
    """What one run of a table found.

    Attributes:
        table: the table's name, as `python -m benchmarks` takes it.
        machine: cores and processor, or the GPU.
        settings: of the run: shape, dtype, rounds and whatever else decides what is measured.
        measurements: in the order of the table.
        environment: versions, platform and processor features, from `vllm_yocou.cli.environment`.
        commit: of the tree that measured; where the tree had other changes, "-changed" follows it and the remark says
            what they were.
        date: UTC, ISO 8601.
        transcribed: individual runs were not kept. Each quantity has the one figure that was printed, and so have
            ratios, where they were printed.
        remark: a sentence on how the values came about, for readers of the file.
    """

    table: str
    machine: str
    settings: dict[str, Any] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    commit: str = ""
    date: str = ""
    transcribed: bool = False
    remark: str = ""

    @classmethod
    def here(cls, table: str, **settings: Any) -> "Result":
        """An empty result of this machine, this environment and this commit."""
        from vllm_yocou.cli import environment  # imported here, because rendering needs none of what it looks at

        described = environment.describe()
        date = datetime.now(UTC).date().isoformat()
        return cls(table, machine(described), settings, environment=described, commit=commit(), date=date)

    def add(self, name: str, unit: str, runs: Sequence[float] | float, **of: Key) -> None:
        values = runs if isinstance(runs, Sequence) else [runs]
        stored = [value if isinstance(value, int) else float(f"{value:.{DIGITS}g}") for value in values]
        self.measurements.append(Measurement(name, unit, of, stored))

    def runs(self, name: str, **of: Key) -> list[float]:
        """Every run's value of the one measurement of that name whose `of` holds these keys, or []."""
        found = [one for one in self.measurements if one.name == name and one.of.items() >= of.items()]
        if len(found) > 1:
            raise LookupError(f"{self.table} has {len(found)} measurements of {name} with {of}: name more keys.")
        return found[0].runs if found else []

    def median(self, name: str, **of: Key) -> float | None:
        runs = self.runs(name, **of)
        return statistics.median(runs) if runs else None

    def mean(self, name: str, **of: Key) -> float | None:
        runs = self.runs(name, **of)
        return statistics.fmean(runs) if runs else None

    def derived(self, name: str, computed: float | None, **of: Key) -> float | None:
        """A figure that follows from others: `computed`, or, of a transcribed result, what was printed (or None)."""
        return self.median(name, **of) if self.transcribed else computed

    def only(self, dtype: str) -> "Result":
        """The part that was measured in one type, as if nothing else had been."""
        rest = [
            replace(one, of={key: value for key, value in one.of.items() if key != "dtype"})
            for one in self.measurements
            if one.of.get("dtype") == dtype
        ]
        return replace(self, settings=self.settings | {"dtype": dtype}, measurements=rest)

    def keys(self, key: str, name: str | None = None) -> list[Any]:
        """The distinct values of a key, in order; among the measurements of one name only, where it is given."""
        chosen = (one for one in self.measurements if name in (None, one.name) and key in one.of)
        return list(dict.fromkeys(one.of[key] for one in chosen))

    @property
    def path(self) -> Path:
        return FOLDER / slug(self.machine) / f"{self.table}.json"

    def save(self, path: Path | None = None) -> Path:
        """Write the file, one measurement a line; by default the one that pages are rendered from."""
        path = path or self.path
        fields = asdict(self)
        lines = [json.dumps(one, ensure_ascii=False) for one in fields.pop("measurements")]
        head = json.dumps(fields, ensure_ascii=False, indent=1).removesuffix("\n}")
        body = ",\n  ".join(lines)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{head},\n "measurements": [\n  {body}\n ]\n}}\n')
        return path

    @classmethod
    def load(cls, path: Path) -> "Result":
        fields = json.loads(path.read_text())
        fields["measurements"] = [Measurement(**one) for one in fields["measurements"]]
        return cls(**fields)

    @classmethod
    def all_of(cls, table: str) -> list["Result"]:
        """One for each machine, in the order of their names."""
        return [cls.load(path) for path in sorted(FOLDER.glob(f"*/{table}.json"))]


def machine(described: dict[str, Any]) -> str:
    """The GPU's name, or the number of cores and the processor's name, from what `environment.describe` says."""
    platform, processor = described["platform"], described["processor"]
    if platform["gpus"]:
        return platform["gpus"][0]
    return f"{processor['cores']} cores of {processor['name'] or platform['machine']}"


def slug(machine: str) -> str:
    """The machine's folder: 2-cores-intel-xeon-2.80ghz for 2 cores of Intel(R) Xeon(R) Processor @ 2.80GHz."""
    bare = re.sub(r"\((r|tm)\)|\b(of|processor|cpu)\b|@", " ", machine.lower())
    return "-".join(re.findall(r"[a-z0-9.]+", bare))


def commit() -> str:
    """The checkout's commit, or "" outside one. Results and pages are not changes, since running tables writes them."""

    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:  # there is no git
            return ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!*.md")
    return git("rev-parse", "--short=12", "HEAD") + "-changed" * bool(changed)
