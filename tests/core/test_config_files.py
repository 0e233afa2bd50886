from __future__ import annotations

import json
import os
import tempfile
import threading
import tomllib
from pathlib import Path

import pytest
from core.configs import configs, faults_of
from hypothesis import given

from swa_core import EMA, ConfigError, LearningRate, Polynomial, SWAConfig

EXAMPLE = SWAConfig(
    start="60%",
    every="2ep",
    stop="90%",
    rule=EMA(half_life=8),
    lr=LearningRate(value=0.05, anneal="2ep", shape="linear"),
    nonfinite="keep",
)
TOML = """\
[swa]
start = "60%"
every = "2ep"
stop = "90%"
rule = { name = "ema", half_life = 8.0 }
nonfinite = "keep"

[swa.lr]
value = 0.05
anneal = "2ep"
shape = "linear"
"""


# Round trips


@given(configs)
def test_toml_and_json_keep_a_configuration(config):
    with tempfile.TemporaryDirectory() as folder:
        for name in ("swa.toml", "swa.json"):
            path = Path(folder) / name
            config.dump(path)
            assert SWAConfig.load(path) == config
            assert SWAConfig.load(path).to_dict() == config.to_dict()
            text = path.read_bytes()
            SWAConfig.load(path).dump(path)
            assert path.read_bytes() == text


@given(configs)
def test_a_table_of_a_pyproject_keeps_a_configuration(config):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "swa.toml"
        config.dump(path)
        other = Path(folder) / "pyproject.toml"
        text = path.read_text().replace("[swa", "[tool.swa")
        other.write_text(f'[project]\nname = "mine"\n\n{text}\n[tool.ruff]\nline-length = 100\n')
        assert SWAConfig.load(other) == config


def test_what_is_written_is_what_a_person_would_write(tmp_path):
    EXAMPLE.dump(tmp_path / "swa.toml")
    assert (tmp_path / "swa.toml").read_text() == TOML
    EXAMPLE.dump(tmp_path / "swa.json")
    assert json.loads((tmp_path / "swa.json").read_text()) == {"swa": EXAMPLE.to_dict()}
    assert (tmp_path / "swa.json").read_text().endswith("}\n")
    assert tomllib.loads(TOML) == {"swa": EXAMPLE.to_dict()}


def test_the_file_of_the_design(tmp_path):
    path = tmp_path / "any name.toml"
    path.write_text(
        '[model]\nwidth = 32\n[swa]\nstart = "75%"\nevery = "1ep"\nrule  = "uniform"\n'
        '[swa.lr]\nvalue  = 0.05\nanneal = "2ep"\n'
    )
    assert SWAConfig.load(path) == SWAConfig(lr=LearningRate(value=0.05, anneal="2ep"))
    assert SWAConfig.of(path) == SWAConfig.of(str(path)) == SWAConfig.load(path)


# Where the table stands


@pytest.mark.parametrize(
    ("name", "text", "start"),
    [
        ("swa.toml", '[swa]\nstart = "1%"', "1%"),
        ("swa.toml", '[tool.swa]\nstart = "2%"', "2%"),
        ("swa.toml", '[swa]\nstart = "1%"\n[tool.swa]\nstart = "2%"', "1%"),
        ("pyproject.toml", '[swa]\nstart = "1%"', "1%"),
        ("pyproject.toml", '[swa]\nstart = "1%"\n[tool.swa]\nstart = "2%"', "2%"),
        ("swa.toml", "[swa]", "75%"),
        ("swa.toml", 'tool = 3\n[swa]\nstart = "1%"', "1%"),
        ("swa.json", '{"swa": {"start": "1%"}, "model": {}}', "1%"),
        ("swa.json", '{"tool": {"swa": {"start": "2%"}}}', "2%"),
    ],
)
def test_tables(tmp_path, name, text, start):
    (tmp_path / name).write_text(text)
    assert SWAConfig.load(tmp_path / name).start == start


def test_a_byte_order_mark_is_no_fault(tmp_path):
    for name, text in (("swa.toml", '[swa]\nstart = "1%"'), ("swa.json", '{"swa": {}}')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        SWAConfig.load(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text", "path"),
    [
        ("swa.toml", '[swa]\nstart = 160\nevry = "1ep"', "swa"),
        ("pyproject.toml", '[tool.swa]\nstart = 160\nevry = "1ep"', "tool.swa"),
        ("swa.json", '{"swa": {"start": 160, "evry": "1ep"}}', "swa"),
    ],
)
def test_a_fault_says_where_it_stands(tmp_path, name, text, path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        SWAConfig.load(tmp_path / name)
    assert str(caught.value) == (
        f"2 faults in {name}\n"
        f'  {path}.start: 160 has no unit. Say "160ep" (epochs), "160step" (updates) or a share '
        'such as "75%".\n'
        f'  {path}.evry: unknown key. Did you mean "every"?'
    )


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        (
            "swa.toml",
            '[sva]\nstart = "1%"\n[model]',
            'swa: the table is missing; the file holds "sva", "model". Put the settings below '
            "[swa].",
        ),
        (
            "pyproject.toml",
            "",
            "tool.swa: the table is missing; the file holds nothing. Put the settings below "
            "[tool.swa].",
        ),
        ("swa.toml", "swa = 5", "swa: expected a table, got 5."),
        ("swa.json", '{"swa": ["start"]}', "swa: expected a table, got ['start']."),
        ("swa.json", '{"swa": null}', 'swa: the table is missing; the file holds "swa".'),
        ("swa.json", "[]", 'holds no table. Write { "swa": { ... } }.'),
        ("swa.json", "", "cannot be read: Expecting value"),
        ("swa.json", '{"swa": {"lr": {"value": NaN}}}', "swa.lr.value: expected a number > 0, got"),
        ("swa.toml", "[swa]\nstart = 75%", "cannot be read: "),
        ("swa.toml", "[swa]\n[swa]", "cannot be read: "),
        ("swa.yaml", "swa:", 'unknown kind of file ".yaml". Known are .toml, .json.'),
        ("swa", "[swa]", 'unknown kind of file "". Known are .toml, .json.'),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, text, fault):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        SWAConfig.load(tmp_path / name)
    assert str(caught.value).startswith(f"1 fault in {name}\n  {fault}")


def test_another_encoding_is_refused(tmp_path):
    (tmp_path / "swa.toml").write_bytes('[swa]\n# Größe\nstart = "1%"'.encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot be read: 'utf-8' codec"):
        SWAConfig.load(tmp_path / "swa.toml")


def test_a_file_that_is_not_there_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        SWAConfig.load(tmp_path / "swa.toml")
    with pytest.raises(FileNotFoundError):
        SWAConfig().dump(tmp_path / "no folder" / "swa.toml")


# Nothing is lost


@pytest.mark.parametrize(
    ("name", "text", "others"),
    [
        ("swa.toml", '[swa]\nstart = "1%"\n[model]\nwidth = 32\n[data]', "data, model"),
        ("swa.json", '{"swa": {}, "model": {}}', "model"),
        ("pyproject.toml", "[project]\n[tool.swa]", "project, tool"),
        ("swa.toml", "width = 3", "width"),
    ],
)
def test_dump_does_not_lose_other_tables(tmp_path, name, text, others):
    (tmp_path / name).write_text(text)
    assert faults_of(EXAMPLE.dump, tmp_path / name) == [
        (
            "",
            f"the file also holds {others}, which writing would lose. Choose another name, or "
            "paste the settings into it by hand.",
        )
    ]
    assert (tmp_path / name).read_text() == text
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    ("name", "text"), [("swa.toml", "no toml"), ("swa.json", "{"), ("a.py", "")]
)
def test_dump_does_not_overwrite_what_it_cannot_read(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError):
        EXAMPLE.dump(tmp_path / name)
    assert (tmp_path / name).read_text() == text


def test_dump_replaces_its_own_table(tmp_path):
    path = tmp_path / "swa.toml"
    for config in (EXAMPLE, SWAConfig(rule=Polynomial(eta=8)), EXAMPLE):
        config.dump(path)
        assert SWAConfig.load(path) == config
    assert os.listdir(tmp_path) == ["swa.toml"]


def test_a_dump_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "swa.toml"
    SWAConfig().dump(path)
    before = path.read_text()

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        EXAMPLE.dump(path)
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["swa.toml"]


def test_a_reader_never_sees_half_a_file(tmp_path):
    path, done, found = tmp_path / "swa.toml", threading.Event(), set()
    SWAConfig().dump(path)

    def read():
        while not done.is_set():
            found.add(SWAConfig.load(path))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(200):
        EXAMPLE.dump(path)
        SWAConfig().dump(path)
    done.set()
    reader.join()
    assert found
    assert found <= {EXAMPLE, SWAConfig()}


@pytest.mark.skipif(os.name == "nt", reason="Windows has neither of them")
def test_dump_keeps_the_mode_and_the_link(tmp_path):
    target, link = tmp_path / "shared.toml", tmp_path / "swa.toml"
    SWAConfig().dump(target)
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()
    target.chmod(0o640)
    link.symlink_to(target)
    EXAMPLE.dump(link)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    assert SWAConfig.load(target) == EXAMPLE


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
