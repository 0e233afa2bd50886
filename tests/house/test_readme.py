"""What the README shows runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import swa_core
from swa_core import ConfigError, SWAConfig

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


def test_readme_shows_the_error_that_is_raised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("swa.toml").write_text('[swa]\nstart = 160\nevry = "1ep"\n', encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        SWAConfig.load("swa.toml")
    assert f"```\n{ConfigError.__module__}.ConfigError: {raised.value}\n```" in README


def test_readme_names_the_two_commands():
    for session in ("demo", "tests"):
        assert f"python -m pip install nox && python -m nox -s {session}" in README


def test_the_version_is_in_the_changelog():
    assert f"## {swa_core.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
