"""What Keras and its backends warn of themselves is not ours to mend."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent

OTHERS = (
    # Keras' own conversions with numpy 2.
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            for line in OTHERS:
                item.add_marker(pytest.mark.filterwarnings(line))
