"""What the README and the pages of the documentation show runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import swa_core
from swa_core import ConfigError, SWAConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# ```python torch  - the word after the language is the adapter, or ecosystem, that a block needs.
BLOCK = re.compile(r"^```python ?([\w-]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = {
    f"{page.name}-{number}": block
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
}


def test_readme_has_an_example_for_each_adapter():
    assert {adapter for adapter, _ in BLOCK.findall(README)} >= {"torch", "keras", "optax"}


@pytest.mark.parametrize("name", BLOCKS)
# Lightning's copy of torch's tree_flatten asks torch for a class under its former name.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning:lightning")
def test_block_runs(request, name, tmp_path, monkeypatch):
    adapter, code = BLOCKS[name]
    if adapter and adapter not in (*request.config.adapters, *request.config.ecosystems):
        pytest.skip(f"{adapter} is not among the chosen adapters")
    (tmp_path / "swa.toml").write_text(toml_block(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, name, "exec"), {"__name__": "readme"})


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
