"""Asks the peers of one family in a process of its own: ``python -m correctness.child NAME …``.

Each answer is written as soon as it is there, a JSON object a line, so that a crash leaves the
others and tells which question it was.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import warnings
from pathlib import Path

from correctness.cells import not_applicable
from correctness.questions import PARTS, answer
from correctness.registry import by_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family")
    parser.add_argument("file", type=Path)
    parser.add_argument("--snapshots", type=int, required=True)
    parser.add_argument("--quick", action="store_true", help="ask slow peers few questions")
    parser.add_argument("--skip", type=int, default=0, help="answers that are there already")
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # what is only warned of is seen by what comes out
    quieten_torch()
    family = by_name(given.family)
    module = importlib.import_module(f"correctness.peers.{family.module}")
    few = given.quick and family.slow
    asked = [
        (peer, question) for peer in module.PEERS for part in PARTS for question in part.questions
    ]
    with given.file.open("a") as out:
        for peer, question in asked[given.skip :]:
            _write(out, {"peer": peer.name, "question": question.title})
            if few and not question.always:
                cell = not_applicable("not asked by --quick")
            else:
                cell = answer(question, peer, given.snapshots)
            _write(out, {"cell": cell._asdict()})
        _write(out, {"done": len(asked)})


def quieten_torch() -> None:
    """One thread: weights are small, and other processes ask at the same time."""
    if importlib.util.find_spec("torch") and os.environ.get("OMP_NUM_THREADS") == "1":
        import torch

        torch.set_num_threads(1)


def _write(out: object, what: dict[str, object]) -> None:
    out.write(json.dumps(what) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
