"""The text of the language model: the language reference that CPython carries for ``help()``.

It lies in ``pydoc_data.topics`` of every Python, so nothing is downloaded; it is not the same in
every version, so results say whose it was by its hash.
"""

from __future__ import annotations

import hashlib
import platform
import pydoc_data.topics
from collections.abc import Iterable
from dataclasses import dataclass

import torch

# The same in every version of the text: what is none of these (some 700 characters, typographic
# quotation marks most of them) is one symbol for all.
CHARACTERS = "\n" + "".join(map(chr, range(32, 127))) + "\N{REPLACEMENT CHARACTER}"
_NUMBERS = {character: number for number, character in enumerate(CHARACTERS)}

PARTS = ("training", "validation", "test")


@dataclass(frozen=True)
class Text:
    """A text in three parts, each contiguous, in this order.

    Attributes:
      training: what is trained on, int64 numbers of ``CHARACTERS`` [n].
      validation: likewise, what choices are made on.
      test: likewise, what is reported.
      sha256: of all three in order, as characters in UTF-8.
      source: where it is from.
      before: characters before repeated paragraphs were left out.
    """

    training: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor
    sha256: str
    source: str
    before: int


def load(shares: tuple[float, float, float]) -> Text:
    """The text, without the paragraphs that it repeats, cut into parts of about these shares."""
    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    parts = cut(paragraphs(topics), shares)
    whole = "".join(parts)
    return Text(
        *map(encode, parts),
        sha256=hashlib.sha256(whole.encode()).hexdigest(),
        source=f"pydoc_data.topics of {platform.python_implementation()} "
        f"{platform.python_version()}",
        before=sum(map(len, topics)),
    )


def paragraphs(texts: Iterable[str]) -> list[str]:
    """The paragraphs of some texts, each once: where it stands first.

    A fifth of the topics is in two or three of them (what the topic on classes says of
    ``__init__``, that on special names says again); what is tested on must not be what was trained
    on. White space does not make a paragraph another one.

    >>> paragraphs(["one\\n\\ntwo,\\n  and a half", "two, and\\na half\\n\\n\\nthree"])
    ['one\\n\\n', 'two,\\n  and a half\\n\\n', 'three\\n\\n']
    """
    found: dict[str, str] = {}
    for text in texts:
        for paragraph in text.split("\n\n"):
            if words := " ".join(paragraph.split()):
                found.setdefault(words, paragraph.strip("\n") + "\n\n")
    return list(found.values())


def cut(pieces: list[str], shares: tuple[float, float, float]) -> tuple[str, str, str]:
    """Joins pieces into three parts whose lengths are about these shares of the whole.

    >>> cut(["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"], (0.8, 0.1, 0.1))
    ('abcdefgh', 'i', 'j')
    """
    total = sum(map(len, pieces))
    parts = ["", "", ""]
    done = 0
    for piece in pieces:
        middle = (done + len(piece) / 2) / total
        parts[(middle > shares[0]) + (middle > shares[0] + shares[1])] += piece
        done += len(piece)
    first, second, third = parts
    return first, second, third


def encode(text: str) -> torch.Tensor:
    """Numbers of ``CHARACTERS``, int64 [n].

    >>> [CHARACTERS[number] for number in encode("a é")]
    ['a', ' ', '�']
    """
    other = len(CHARACTERS) - 1
    return torch.tensor([_NUMBERS.get(character, other) for character in text])


def starts(length: int, context: int, updates: int, batch: int, seed: int) -> torch.Tensor:
    """Where in the training part each batch's sequences begin, int64 [updates, batch].

    All updates at once, so that update u sees the same sequences in every arm.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(length - context, (updates, batch), generator=generator)


def sequences(
    part: torch.Tensor, begin: torch.Tensor, context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is read and what is to be said after each character, both int64 [batch, context].

    >>> read, said = sequences(torch.arange(10), torch.tensor([0, 6]), 3)
    >>> read.tolist(), said.tolist()
    ([[0, 1, 2], [6, 7, 8]], [[1, 2, 3], [7, 8, 9]])
    """
    places = begin[:, None] + torch.arange(context + 1)
    found = part[places]
    return found[:, :-1], found[:, 1:]
