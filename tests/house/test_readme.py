"""What the README shows runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from swa_core import SWAConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# ```python adapter  - the word after the language is the adapter that a block needs.
BLOCKS = re.findall(r"^```python ?(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_readme_has_an_example_for_each_adapter():
    assert {adapter for adapter, _ in BLOCKS} >= {"torch", "keras", "optax"}


@pytest.mark.parametrize(("adapter", "code"), BLOCKS, ids=lambda value: value[:8].strip())
def test_readme_block_runs(request, adapter, code, tmp_path, monkeypatch):
    if adapter and adapter not in request.config.adapters:
        pytest.skip(f"{adapter} is not among the chosen adapters")
    (tmp_path / "swa.toml").write_text(toml_block(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def toml_block():
    (block,) = re.findall(r"^```toml\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return block


def test_readme_configuration_is_read(tmp_path):
    (tmp_path / "swa.toml").write_text(toml_block(), encoding="utf-8")
    config = SWAConfig.load(tmp_path / "swa.toml")
    assert config.schedule(steps_per_epoch=10, total_steps=200).first == 150


def test_readme_names_the_two_commands():
    for session in ("demo", "tests"):
        assert f"python -m pip install nox && python -m nox -s {session}" in README


def test_the_version_is_in_the_changelog():
    import swa_core

    assert f"## {swa_core.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
