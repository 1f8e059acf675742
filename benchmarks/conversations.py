"""Conversations with think times and growing histories, made from a seed: every replay of a trace sends the same turns.

All conversations begin with one system prompt. A turn sends the whole history, with the answers that were given, and a
message; its user thinks before the next turn. Lengths are in tokens, times in seconds. Both are drawn from log-normal
distributions, and a value beyond the bounds becomes the bound.

CHATS is 16 conversations of 4 to 8 turns, which begin within 60 s: a system prompt of 160 tokens, a first message of
250 at the median (50 to 1,000), further messages of 60 (8 to 400), answers of 80 (16 to 256), and 12 s of thinking (2
to 60). With its seed this makes 106 turns, and the histories end with 964 to 2,499 tokens.

DOCUMENTS is the same with a document of 8,000 tokens at the median (2,000 to 28,000) as the first message.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

VOCABULARY = 8192


@dataclass(frozen=True)
class Lengths:
    """A log-normal distribution with bounds.

    Attributes:
        median, least, most: in the unit of what is drawn.
        spread: standard deviation of the logarithm.
    """

    median: float
    spread: float
    least: float
    most: float

    def draw(self, numbers: random.Random) -> float:
        return min(self.most, max(self.least, self.median * numbers.lognormvariate(0, self.spread)))


@dataclass(frozen=True)
class Turn:
    """Attributes:

    message: token ids that follow the history.
    answer: tokens of the answer.
    think_s: seconds before the next turn.
    """

    message: list[int]
    answer: int
    think_s: float


@dataclass(frozen=True)
class Conversation:
    """Attributes:

    start_s: when its first turn is sent.
    turns: whose first message begins with the system prompt.
    """

    start_s: float
    turns: list[Turn]

    @property
    def tokens(self) -> int:
        """Of the whole history, the last answer included."""
        return sum(len(turn.message) + turn.answer for turn in self.turns)


@dataclass(frozen=True)
class Trace:
    """What conversations are drawn from.

    Attributes:
        conversations: their number.
        turns: the fewest and the most of one.
        begin_s: all of them begin within this time.
        system: tokens of the prompt that all of them share.
        first, further, answers: tokens of the first message and of later ones, and of answers.
        think_s: seconds between an answer and the next message.
    """

    conversations: int = 16
    turns: tuple[int, int] = (4, 8)
    begin_s: float = 60
    system: int = 160
    first: Lengths = Lengths(250, 0.7, 50, 1000)
    further: Lengths = Lengths(60, 0.8, 8, 400)
    answers: Lengths = Lengths(80, 0.6, 16, 256)
    think_s: Lengths = Lengths(12, 0.7, 2, 60)
    seed: int = 0

    def draw(self) -> list[Conversation]:
        numbers = random.Random(self.seed)
        system = tokens(self.system, numbers)
        return [
            Conversation(numbers.uniform(0, self.begin_s), list(self._turns(system, numbers)))
            for _ in range(self.conversations)
        ]

    def _turns(self, system: list[int], numbers: random.Random) -> Iterator[Turn]:
        for index in range(numbers.randint(*self.turns)):
            message = tokens(round((self.further if index else self.first).draw(numbers)), numbers)
            answer, think_s = round(self.answers.draw(numbers)), self.think_s.draw(numbers)
            yield Turn(message if index else system + message, answer, think_s)

    def needed(self, conversations: list[Conversation]) -> int:
        """Tokens that must be computed at least: every one once, the last of a history never."""
        shared = (len(conversations) - 1) * self.system
        return sum(conversation.tokens - 1 for conversation in conversations) - shared


def tokens(count: int, numbers: random.Random) -> list[int]:
    """`count` token ids; 0 to 2 may be special."""
    return [numbers.randrange(3, VOCABULARY) for _ in range(count)]


CHATS = Trace()
DOCUMENTS = replace(CHATS, first=Lengths(8000, 0.7, 2000, 28_000))
