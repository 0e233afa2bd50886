"""Every question tells a wrong averager from a right one."""

from __future__ import annotations

import pytest
from correctness.questions import PARTS, answer

from .broken_averagers import averager

QUESTIONS = {question.title: question for part in PARTS for question in part.questions}
# Which questions each flaw is to be found by, and what they say.
FLAWS = {
    "keeps bfloat16": {
        "bfloat16": "e-",
        "float16": "e-",
        "bfloat16 is kept in": "bfloat16",
    },
    "takes NaN in": {"one NaN snapshot": "NaN for ever"},
    "averages integers": {"integer buffer": "averaged"},
    "averages twice": {"tied weights": "averaged twice, stay tied"},
    "unties": {"tied weights": "averaged once, no longer tied"},
    "weighs batches equally": {"batch norm, ragged batches": "e-"},
    "loses prefixed names": {"compiled model": "stands still"},
    "counts from zero": {"start 10, every 4": "11, 15, 19"},
    "begins at zero": {"before the first snapshot": "zeros"},
    "shares memory": {"memory of the average": "shared after an update"},
    "forgets its count": {"resume": "differs", "resume, bfloat16": "differs"},
    "cannot be pickled": {"deepcopy, pickle": "deepcopy goes on; pickle raises"},
    "swaps by adding": {"after a swap": "training weights, "},
    "left in by a raise": {"after a raise in it": "the average is left in"},
}


def answers(flaw, snapshots=100):
    return {title: answer(it, averager(flaw), snapshots) for title, it in QUESTIONS.items()}


def test_who_is_right_is_called_right():
    found = answers("")
    del found["rule"]
    assert {title: cell for title, cell in found.items() if cell.right is not True} == {}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_is_found_by_its_questions(flaw):
    found = answers(flaw)
    wrong = {title: cell.text for title, cell in found.items() if cell.right is False}
    if flaw == "shares memory":  # an average that is the weights is wrong in other ways besides
        wrong = {title: text for title, text in wrong.items() if title in FLAWS[flaw]}
    assert wrong.keys() == FLAWS[flaw].keys()
    for title, words in FLAWS[flaw].items():
        assert words in wrong[title]


def test_every_question_has_a_flaw():
    asked = {title for titles in FLAWS.values() for title in titles}
    assert asked == QUESTIONS.keys() - {"rule", "float32"}
