"""The conversations of the table of prefix caching: drawn from a seed, as long as is said, and counted by hand."""

from itertools import pairwise

import pytest

from benchmarks.conversations import CHATS, DOCUMENTS, VOCABULARY, Conversation, Trace, Turn


@pytest.mark.parametrize("trace", [CHATS, DOCUMENTS], ids=["chats", "documents"])
def test_a_seed_makes_the_same_turns_within_the_bounds(trace):
    conversations = trace.draw()
    assert trace.draw() == conversations != Trace(seed=1).draw()
    system = conversations[0].turns[0].message[: trace.system]
    for conversation in conversations:
        assert 0 <= conversation.start_s <= trace.begin_s
        assert trace.turns[0] <= len(conversation.turns) <= trace.turns[1]
        first, *further = conversation.turns
        assert first.message[: trace.system] == system
        assert trace.first.least <= len(first.message) - trace.system <= trace.first.most
        for turn in conversation.turns:
            assert trace.answers.least <= turn.answer <= trace.answers.most
            assert trace.think_s.least <= turn.think_s <= trace.think_s.most
            assert all(2 < token < VOCABULARY for token in turn.message)
        assert all(trace.further.least <= len(turn.message) <= trace.further.most for turn in further)
    # Nobody's message is another's.
    assert all(one.turns[0].message != other.turns[0].message for one, other in pairwise(conversations))


def test_chats_are_as_long_as_is_said():
    conversations = CHATS.draw()
    tokens = [conversation.tokens for conversation in conversations]
    turns = sum(len(conversation.turns) for conversation in conversations)
    assert (turns, min(tokens), max(tokens)) == (106, 964, 2499)


def test_every_token_is_needed_once_but_the_last():
    """The system prompt is needed once for all; whoever asks again with an answer needs the tokens behind it."""
    conversations = [
        Conversation(0, [Turn([3] * 30, 5, 1), Turn([4] * 10, 5, 1)]),
        Conversation(1, [Turn([3] * 40, 7, 1)]),
    ]
    assert [conversation.tokens for conversation in conversations] == [50, 47]
    assert Trace(system=20).needed(conversations) == 49 + 46 - 20
