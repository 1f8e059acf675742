"""Write the tasks' data from the chapters that training never saw: `python examples/evaluation/make_kjv.py CORPUS`.

kjv_next_verse.jsonl: which of four verses follows.
kjv_last_word.jsonl: the last word of a verse, after the verses before.
"""

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import corpus

HERE = Path(__file__).parent
CONTEXT = 4  # verses shown
ITEMS = 200


def next_verse(chapters: list[corpus.Chapter], shuffler: random.Random) -> Iterator[dict]:
    """The three wrong verses come from other held-out chapters."""
    while True:
        chapter = shuffler.choice(chapters)
        at = shuffler.randrange(1, len(chapter.verses))
        others = shuffler.sample([other for other in chapters if other is not chapter], 3)
        choices = [chapter.verses[at], *(shuffler.choice(other.verses) for other in others)]
        right = choices[0]
        shuffler.shuffle(choices)
        context = "\n".join((chapter.title, *chapter.verses[max(0, at - CONTEXT) : at]))
        yield {"context": context, "choices": choices, "gold": choices.index(right)}


def last_word(chapters: list[corpus.Chapter], shuffler: random.Random) -> Iterator[dict]:
    while True:
        chapter = shuffler.choice(chapters)
        at = shuffler.randrange(1, len(chapter.verses))
        found = re.fullmatch(r"(.+) ([A-Za-z']+)[.,:;?!]*", chapter.verses[at])
        if found:
            before, word = found.groups()
            yield {
                "context": "\n".join((chapter.title, *chapter.verses[max(0, at - CONTEXT) : at], before)),
                "word": word,
            }


def main() -> None:
    _, held_out = corpus.split(corpus.read(Path(sys.argv[1])))
    held_out = [chapter for chapter in held_out if len(chapter.verses) > 1]
    for name, items in (("kjv_next_verse", next_verse), ("kjv_last_word", last_word)):
        stream = items(held_out, random.Random(0))
        lines = [json.dumps(next(stream)) + "\n" for _ in range(ITEMS)]
        (HERE / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
