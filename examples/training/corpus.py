"""The King James Bible as a corpus: chapters of verses, every twentieth chapter held out.

Source: Debian's packages `bible-kjv` (the reader) and `bible-kjv-text` (the text, in the public domain outside the
United Kingdom, where Crown letters patent restrict printing). No installation is needed:

    apt-get download bible-kjv bible-kjv-text && for p in bible-kjv*.deb; do dpkg -x $p kjv; done
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_EVERY = 20

BOOKS = re.split(
    r",\s+",
    """Genesis, Exodus, Leviticus, Numbers, Deuteronomy, Joshua, Judges, Ruth, 1 Samuel, 2 Samuel, 1 Kings, 2 Kings,
    1 Chronicles, 2 Chronicles, Ezra, Nehemiah, Esther, Job, Psalm, Proverbs, Ecclesiastes, Song of Solomon, Isaiah,
    Jeremiah, Lamentations, Ezekiel, Daniel, Hosea, Joel, Amos, Obadiah, Jonah, Micah, Nahum, Habakkuk, Zephaniah,
    Haggai, Zechariah, Malachi, Matthew, Mark, Luke, John, Acts, Romans, 1 Corinthians, 2 Corinthians, Galatians,
    Ephesians, Philippians, Colossians, 1 Thessalonians, 2 Thessalonians, 1 Timothy, 2 Timothy, Titus, Philemon,
    Hebrews, James, 1 Peter, 2 Peter, 1 John, 2 John, 3 John, Jude, Revelation""",
)


@dataclass(frozen=True)
class Chapter:
    title: str
    verses: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join((self.title, *self.verses))


def read(unpacked: Path) -> list[Chapter]:
    """All 1,189 chapters in order, from the unpacked packages."""
    reader = [str(unpacked / "usr/bin/bible"), "-p", str(unpacked / "usr/lib"), "-f", "gen1:1-rev22:21"]
    printed = subprocess.run(reader, check=True, capture_output=True, text=True).stdout
    verses: dict[tuple[str, int], list[str]] = {}
    for line in printed.splitlines():
        found = re.match(r"(\w+?)(\d+):\d+ (.*)", line)
        if found is None:
            raise ValueError(f"the reader printed {line!r}, which is not a verse: install both packages again.")
        book, chapter, verse = found.groups()
        verses.setdefault((book, int(chapter)), []).append(re.sub(r"\s+", " ", verse).strip())
    abbreviations = list(dict.fromkeys(book for book, _ in verses))
    if len(abbreviations) != len(BOOKS):
        raise ValueError(f"the reader printed {len(abbreviations)} books, {len(BOOKS)} expected: is the text complete?")
    names = dict(zip(abbreviations, BOOKS, strict=True))
    return [Chapter(f"{names[book]} {chapter}", tuple(lines)) for (book, chapter), lines in verses.items()]


def split(chapters: list[Chapter]) -> tuple[list[Chapter], list[Chapter]]:
    """Training and held-out chapters; the held-out ones are every twentieth, so that every kind of book is in both."""
    held_out = chapters[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    return [chapter for chapter in chapters if chapter not in held_out], held_out
