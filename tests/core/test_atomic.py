"""Files go to the disk while they are written, and what the disk says is told."""

from __future__ import annotations

import errno
import threading

import pytest

from swa_core import atomic
from swa_core.atomic import flushing, replacing


def test_what_is_written_goes_to_the_disk_meanwhile(tmp_path, monkeypatch):
    flushed = threading.Event()
    monkeypatch.setattr(atomic.os, "fsync", lambda descriptor: flushed.set())
    with open(tmp_path / "file", "wb") as file, flushing(file):
        assert flushed.wait(60)
    assert not [thread for thread in threading.enumerate() if thread.name == "flushing"]


def test_what_the_disk_does_not_take_meanwhile_is_told(tmp_path, monkeypatch):
    asked = threading.Event()

    def full(descriptor):
        asked.set()
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(atomic.os, "fsync", full)

    def write():
        with replacing(tmp_path / "file") as file, flushing(file):
            asked.wait(60)
            # The last flush would not tell it again.
            monkeypatch.setattr(atomic.os, "fsync", lambda descriptor: None)

    with pytest.raises(OSError, match="no space"):
        write()
    assert not any(tmp_path.iterdir())
