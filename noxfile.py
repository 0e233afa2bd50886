"""The project's commands: ``python -m nox -s tests``, ``-s demo``, ``-l`` for all."""

from __future__ import annotations

import os
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "docs", "tests", "wheel"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
GROUPS = PYPROJECT["dependency-groups"]
CONSTRAINTS = Path("constraints.txt").resolve()
KERAS_BACKENDS = ("jax", "tensorflow", "torch")


def install(session: nox.Session, *packages: str) -> None:
    """Installs with the tested versions, by pip: the CPU build of torch is found by it alone."""
    session.install("--constraint", str(CONSTRAINTS), *packages)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests, in every framework and on every Keras backend (one process for each)."""
    groups = ("test", "ecosystem", "bench")
    install(session, "--editable", ".[all]", *(each for group in groups for each in GROUPS[group]))
    # timm, whose optimizers need none of what it says it needs.
    install(session, "--no-deps", *GROUPS["bench-alone"])
    env = {"TF_CPP_MIN_LOG_LEVEL": "2"}
    if session.posargs:
        session.run("pytest", *session.posargs, env=env)
        return
    # A file's tests stay together: some share what is slow to start. Every process holds three
    # frameworks, so more cores are not taken.
    parallel = ("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile")
    first, *others = KERAS_BACKENDS
    session.run("pytest", *parallel, f"--keras-backend={first}", env=env)
    for backend in others:
        session.run(
            "pytest",
            *parallel,
            f"--keras-backend={backend}",
            "tests/adapter_keras",
            "tests/differential",
            "tests/test_conformance.py",
            # What does not depend on the backend has run.
            *("-k", "not TorchDriver and not OptaxDriver and not CoreDriver"),
            env=env,
        )


@nox.session
def lint(session: nox.Session) -> None:
    """Style, and the layering of the packages."""
    install(session, *GROUPS["lint"])
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.env["PYTHONPATH"] = f"{Path.cwd()}:{Path.cwd() / 'adapters'}"
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Strict types of the core."""
    install(session, *GROUPS["types"])
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Every example in a docstring and the README runs, and prints what it says."""
    # With all who average: the benchmarks' files import them.
    install(session, "--editable", ".[all]", *GROUPS["test"], *GROUPS["bench"])
    install(session, "--no-deps", *GROUPS["bench-alone"])
    path = os.pathsep.join(["examples", "benchmarks"])
    env = {"KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONPATH": path}
    files = ["examples/record.py", "examples/report.py"]
    files += [
        f"benchmarks/{name}.py"
        for name in ("timing", "reference", "torch_reference", "torch_sets", "keras_sets", "growth")
    ]
    files += ["benchmarks/checkpoint_sets.py", "benchmarks/command.py", "benchmarks/machine.py"]
    files += ["benchmarks/correctness", "benchmarks/experiments", "benchmarks/speed"]
    files += [f"benchmarks/optax_{name}.py" for name in ("contenders", "snapshots", "training")]
    session.run("pytest", "--doctest-modules", "swa_core", "adapters", *files, env=env)
    # Without the ecosystem, which this session does not install.
    chosen = "--adapters=torch,keras,optax"
    session.run("pytest", chosen, "tests/house/test_readme.py", env=env)


@nox.session
def wheel(session: nox.Session) -> None:
    """The wheel, built and installed away from the checkout, does what the checkout does."""
    install(session, "build")
    out = session.create_tmp()
    session.run("python", "-m", "build", "--wheel", "--outdir", out, silent=True)
    (built,) = Path(out).glob("*.whl")
    install(session, "--force-reinstall", str(built))  # and what it says it needs: numpy
    session.chdir(out)
    session.run("python", str(Path(__file__).parent / "tests" / "house" / "check_wheel.py"))


@nox.session
def demo(session: nox.Session) -> None:
    """The main job: digits in every framework from one swa.toml (``-- --help`` for more)."""
    install(session, "--editable", ".[all]")
    session.run("python", "examples/demo.py", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Thousands of damaged checkpoints of every kind (``-- --help`` for how many)."""
    install(session, "--editable", ".[torch,keras,optax,orbax]", *GROUPS["test"])
    session.run("python", "-m", "fuzz.run", *session.posargs, env={"PYTHONPATH": "tests"})


@nox.session
def bench(session: nox.Session) -> None:
    """The evidence, beside whoever else averages: ``-- speed``, ``-- correctness --help``, ..."""
    known = sorted(path.stem for path in Path("benchmarks").glob("*.py") if has_main(path))
    name, *arguments = session.posargs or ["speed"]
    if name not in known:
        session.error(f"{name} is no benchmark; there are {', '.join(known)}")
    install(session, "--editable", ".[all]", *GROUPS["bench"])
    # What they say they need fits no CPU build of torch, and what is benchmarked does not need it.
    install(session, "--no-deps", *GROUPS["bench-alone"])
    session.run("python", f"benchmarks/{name}.py", *arguments, env={"TF_CPP_MIN_LOG_LEVEL": "2"})


def has_main(path: Path) -> bool:
    """Whether a file is a command."""
    return "__main__" in path.read_text(encoding="utf-8")
