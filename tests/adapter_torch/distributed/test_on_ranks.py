"""Averages of distributed trainings: real processes, started by torchrun, that talk over gloo."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from adapter_torch.distributed.checks import BY_RANKS
from adapter_torch.distributed.launching import launch


@pytest.fixture(scope="session")
def launched(tmp_path_factory) -> Callable[[int], dict[str, str | None]]:
    """What the checks on so many ranks came to; each launch is made once."""
    folder = tmp_path_factory.mktemp("ranks")
    done: dict[int, dict[str, str | None]] = {}

    def on(ranks: int) -> dict[str, str | None]:
        # The others load what two ranks save.
        for number in dict.fromkeys((2, ranks)):
            if number not in done:
                done[number] = launch(number, folder)
        return done[ranks]

    return on


@pytest.mark.parametrize(
    ("ranks", "name"), [(ranks, name) for ranks, checks in BY_RANKS.items() for name in checks]
)
def test_on_ranks(launched, ranks, name):
    fault = launched(ranks)[name]
    assert fault is None, fault
