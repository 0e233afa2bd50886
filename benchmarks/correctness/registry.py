"""Which files of peers there are, what they need, and what they hold; nothing is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """Peers that run in one process.

    Attributes:
      name: what ``--only`` takes.
      module: the file in ``correctness.peers``.
      packages: what is to be installed, as pip calls it.
      imports: what is imported for it.
      environment: variables of its process.
      slow: whether each of its trainings takes seconds (compilation, a Trainer), so that the quick
        command asks few questions.
    """

    name: str
    module: str
    packages: tuple[str, ...]
    imports: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    slow: bool = False


def _keras(backend: str, package: str) -> tuple[Family, Family]:
    environment = {"KERAS_BACKEND": backend}
    needs = (("keras", package), ("keras", backend))
    return (
        Family(f"swa_keras-{backend}", "ours_keras", *needs, environment, slow=True),
        Family(f"keras-{backend}", "keras_ema", *needs, environment, slow=True),
    )


_KERAS = [
    _keras("tensorflow", "tensorflow"),
    _keras("jax", "jax"),
    _keras("torch", "torch"),
]
OURS = [
    Family("swa_core", "ours_core", ("ml_dtypes",), ("ml_dtypes",)),
    Family("swa_torch", "ours_torch", ("torch",), ("torch",)),
    *(ours for ours, _ in _KERAS),
    Family("swa_optax", "ours_optax", ("optax", "flax"), ("optax", "flax"), slow=True),
]
OTHERS = [
    Family("averaged_model", "torch_averaged_model", ("torch",), ("torch",)),
    Family("torchcontrib", "torchcontrib_swa", ("torchcontrib",), ("torchcontrib",)),
    Family("lightning", "lightning_callbacks", ("lightning",), ("lightning",), slow=True),
    Family("timm", "timm_ema", ("timm",), ("timm",)),
    Family("ema-pytorch", "ema_pytorch_ema", ("ema-pytorch",), ("ema_pytorch",)),
    Family("torch-ema", "torch_ema_ema", ("torch-ema",), ("torch_ema",)),
    Family("schedulefree", "schedulefree_sgd", ("schedulefree",), ("schedulefree",)),
    *(theirs for _, theirs in _KERAS),
    Family("optax", "optax_averages", ("optax",), ("optax",)),
    Family("flax", "flax_ema", ("flax",), ("flax",), slow=True),
]
FAMILIES = [*OURS, *OTHERS]
# Keras runs the same code on every backend; the quick command takes one.
QUICK = [
    family.name for family in FAMILIES if family.environment.get("KERAS_BACKEND") in (None, "jax")
]
# What else the figures depend on.
ALSO = ("numpy", "jax", "jaxlib", "tensorflow", "keras", "torch")


def by_name(name: str) -> Family:
    """The family of this name."""
    (found,) = [family for family in FAMILIES if family.name == name]
    return found
