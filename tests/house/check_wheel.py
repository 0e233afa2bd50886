"""Run by ``nox -s wheel`` away from the checkout: what the wheel holds, and that it works."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points, files, metadata
from pathlib import Path

import swa_core
from swa_core.testing import CoreDriver, check_adapter

CHECKOUT = Path(__file__).resolve().parents[2]

assert not Path(swa_core.__file__).is_relative_to(CHECKOUT / "swa_core"), swa_core.__file__
inside = {str(path) for path in files("swa-core")}
for package in ("swa_core", "swa_torch", "swa_keras", "swa_optax"):
    for name in ("__init__.py", "py.typed"):
        assert f"{package}/{name}" in inside, f"the wheel lacks {package}/{name}"
stray = {
    path for path in inside if path.startswith(("tests", "benchmarks", "examples", "adapters"))
}
assert not stray, f"the wheel holds {sorted(stray)}"
assert "swa_core/testing/checks.py" in inside
assert metadata("swa-core")["Version"] == swa_core.__version__
frameworks = {"torch", "tensorflow", "keras", "jax", "optax", "flax"} & set(sys.modules)
assert not frameworks, frameworks
kinds = {point.name for point in entry_points(group="swa_core.checkpoints")}
suffixes = {name for name in kinds if not name.startswith("folder/")}
assert suffixes == {".pt", ".pth", ".bin", ".ckpt", ".h5", ".keras"}, suffixes
folders = {name.removeprefix("folder/") for name in kinds - suffixes}
assert {".metadata", "_METADATA", "_CHECKPOINT_METADATA"} <= folders, folders
command = Path(sys.executable).with_name("swa")
assert b"swa average" in subprocess.run([command, "average", "--help"], capture_output=True).stdout
results = check_adapter(CoreDriver)
print(f"{len(results)} passed, 0 failed")
