"""What the import contracts (.importlinter) cannot say about the adapters' files."""

from __future__ import annotations

import ast
from pathlib import Path

ADAPTERS = Path(__file__).parents[2] / "adapters"
BACKENDS = {"tensorflow", "jax", "torch"}


def packages_imported_by(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module.partition(".")[0]


def test_keras_imports_a_backend_only_in_the_file_of_that_backend():
    files = sorted((ADAPTERS / "swa_keras").rglob("*.py"))
    assert files
    for path in files:
        own = {backend for backend in BACKENDS if backend in path.stem}
        found = BACKENDS.intersection(packages_imported_by(path))
        assert found <= own, f"{path.name} imports {sorted(found)}"


def test_the_adapters_folder_is_a_source_root_and_no_package():
    # A package of that name would collide with another project's.
    assert not (ADAPTERS / "__init__.py").exists()
