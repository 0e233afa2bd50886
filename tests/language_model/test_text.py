"""The parts of the text share nothing, and are the text."""

from __future__ import annotations

import pydoc_data.topics

import torch
from experiments import language_text as language


def written(numbers):
    return "".join(language.CHARACTERS[number] for number in numbers)


def test_parts_are_the_text_without_its_repeats_in_order(whole_text):
    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    parts = [whole_text.training, whole_text.validation, whole_text.test]
    whole = "".join(language.paragraphs(topics))
    assert torch.equal(torch.cat(parts), language.encode(whole))
    assert sum(map(len, topics)) == whole_text.before > len(whole)
    shares = [len(part) / len(whole) for part in parts]
    assert all(abs(a - b) < 0.01 for a, b in zip(shares, (0.8, 0.1, 0.1), strict=True))


def test_no_paragraph_is_in_two_parts(whole_text):
    parts = (whole_text.training, whole_text.validation, whole_text.test)
    sets = [
        {" ".join(found.split()) for found in written(part.tolist()).split("\n\n") if found.strip()}
        for part in parts
    ]
    assert all(len(found) > 100 for found in sets)
    for number, found in enumerate(sets):
        for other in sets[number + 1 :]:
            assert not found & other


def test_topics_do_repeat_each_other():
    # Or the test above would hold without what it tests.
    topics = pydoc_data.topics.topics
    assert "object.__init__(self" in topics["specialnames"]
    assert "object.__init__(self" in topics["customization"]


def test_every_character_is_a_character_of_the_network(whole_text):
    for part in (whole_text.training, whole_text.validation, whole_text.test):
        assert part.dtype == torch.int64
        assert part.min() >= 0
        assert part.max() < len(language.CHARACTERS)
    # What is none is little, so that it is not what is learnt.
    other = (whole_text.training == len(language.CHARACTERS) - 1).float().mean()
    assert 0 < other < 0.01


def test_sequences_stay_within_their_part():
    context, length = 7, 20
    begin = language.starts(length, context, updates=500, batch=4, seed=0)
    assert begin.shape == (500, 4)
    assert set(begin.flatten().tolist()) == set(range(length - context))
    read, said = language.sequences(torch.arange(length), begin[0], context)
    assert torch.equal(read + 1, said)
    assert torch.equal(read[:, 0], begin[0])


def test_seeds_read_in_orders_of_their_own():
    one, again, other = (language.starts(1000, 10, 50, 2, seed) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
