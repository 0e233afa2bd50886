"""Who averages weights in PyTorch: each as its users call it, in the fastest way it offers.

Every contender is built from a module and then told to take the weights in, again and again. What
the average must be follows from ``mix``, so that each can be checked against float64. Where weights
are bfloat16, an average in float32 is asked for; whoever cannot keep one, keeps it in bfloat16.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import ceiling
import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import swa_utils

from swa_torch import SWA

ALWAYS = {"start": "1step", "every": "1step"}
NEVER = {"start": "1000000000step", "every": "1step"}
DECAY = 0.9


class Running(NamedTuple):
    """An average at work.

    Attributes:
      update: takes the weights in.
      averages: the averages in the order of the module's parameters.
      swap_in: puts the averages into the module, None for who has no way of doing so.
      swap_out: puts the weights back.
    """

    update: Callable[[], object]
    averages: Callable[[], Iterable[Tensor]]
    swap_in: Callable[[], object] | None = None
    swap_out: Callable[[], object] | None = None


def uniform(update: int) -> float:
    """How much update ``update`` (the first is 1) weighs in a mean of all."""
    return 1.0 / update


def moving(update: int) -> float:
    """In an exponential moving average that the first update begins."""
    return 1.0 if update == 1 else 1.0 - DECAY


def moving_from_initial(update: int) -> float:
    """In an exponential moving average that the weights of its making begin."""
    return 1.0 - DECAY


@dataclass(frozen=True)
class Contender:
    """One way to average.

    Attributes:
      name: its row in the tables.
      build: makes the average of a module.
      mix: how much an update weighs, by its number.
      package: what must be installed for it, as pip calls it.
      imports: gets what it needs, or raises.
    """

    name: str
    build: Callable[[Module], Running]
    mix: Callable[[int], float]
    package: str = "torch"
    imports: Callable[[], object] = lambda: torch

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        try:
            self.imports()
        except Exception as error:  # built for another torch, say
            return f"NOT INSTALLED: {self.package} ({type(error).__name__}: {error})"
        return None


class Idle(torch.optim.Optimizer):
    """An optimizer whose step costs next to nothing, so that averaging alone is timed."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {})

    def step(self, closure: Callable[[], object] | None = None) -> None:
        pass


def is_half(module: Module) -> bool:
    """Whether the weights are narrower than float32."""
    return next(module.parameters()).itemsize < 4


def wide_copy(module: Module) -> Module:
    """A copy in float32 or wider, for those whose average has the copy's dtype."""
    copied = copy.deepcopy(module)
    return copied.float() if is_half(module) else copied


# The ceiling.


def c_loop(module: Module) -> Running:
    weights = [parameter.detach() for parameter in module.parameters()]
    averages = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    pairs = ceiling.Pairs(averages, weights, torch.get_num_threads())
    count = itertools.count(1)
    swap = None if is_half(module) else pairs.swap
    return Running(lambda: pairs.lerp(1.0 / next(count)), lambda: averages, swap, swap)


# Ours.


def ours(nonfinite: str, **keywords: object) -> Callable[[Module], Running]:
    def build(module: Module) -> Running:
        optimizer = SWA(Idle(module.parameters()), {**ALWAYS, "nonfinite": nonfinite}, **keywords)
        block = ExitStack()
        return Running(
            optimizer.step,
            lambda: optimizer.averaged_parameters,
            lambda: block.enter_context(optimizer.averaged()),
            block.close,
        )

    return build


# torch's own. It has no swap: what its users do is copy the weights away and load.


def averaged_model(*, mixes_dtypes: bool, **functions: object) -> Callable[[Module], Running]:
    def build(module: Module) -> Running:
        copied = wide_copy(module) if mixes_dtypes else module
        average = swa_utils.AveragedModel(copied, **functions)
        kept: dict[str, Tensor] = {}

        def swap_in() -> None:
            kept.update({name: value.clone() for name, value in module.state_dict().items()})
            module.load_state_dict(average.module.state_dict())

        def swap_out() -> None:
            module.load_state_dict(kept)
            kept.clear()

        return Running(
            lambda: average.update_parameters(module), average.parameters, swap_in, swap_out
        )

    return build


# torchcontrib.


def import_torchcontrib() -> ModuleType:
    import torchcontrib.optim

    return torchcontrib.optim


def torchcontrib_swa(module: Module) -> Running:
    parameters = list(module.parameters())
    optimizer = import_torchcontrib().SWA(Idle(parameters))
    return Running(
        optimizer.update_swa,
        lambda: [optimizer.state[parameter]["swa_buffer"] for parameter in parameters],
        optimizer.swap_swa_sgd,
        optimizer.swap_swa_sgd,
    )


# timm.


def import_timm() -> ModuleType:
    """timm's file with the moving averages.

    Importing timm needs a torchvision that fits torch, which this file does not; where there is
    none, the very file that is installed is loaded on its own.
    """
    try:
        import timm.utils.model_ema as loaded
    except (ImportError, RuntimeError) as error:
        if "torchvision" not in str(error):
            raise
        loaded = _load_alone("timm", "utils/model_ema.py")
    return loaded


def _load_alone(package: str, path: str) -> ModuleType:
    name = f"{package}_{path.replace('/', '_').removesuffix('.py')}"
    if name not in sys.modules:
        found = importlib.util.find_spec(package)
        assert found is not None
        assert found.submodule_search_locations is not None
        file = f"{found.submodule_search_locations[0]}/{path}"
        spec = importlib.util.spec_from_file_location(name, file)
        assert isinstance(spec, ModuleSpec)
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def timm_v3(module: Module) -> Running:
    dtype = torch.float32 if is_half(module) else None
    average = import_timm().ModelEmaV3(module, decay=DECAY, dtype=dtype)
    return Running(lambda: average.update(module), average.module.parameters)


# ema-pytorch.


def import_ema_pytorch() -> ModuleType:
    import ema_pytorch

    return ema_pytorch


def ema_pytorch(module: Module, *, update_every: int = 1) -> Running:
    average = import_ema_pytorch().EMA(
        module,
        ema_model=wide_copy(module),
        beta=DECAY,
        min_value=DECAY,  # no warm-up
        update_after_step=0,
        update_every=update_every,
        use_foreach=True,
        coerce_dtype=is_half(module),
    )
    return Running(average.update, average.ema_model.parameters)


# torch-ema.


def import_torch_ema() -> ModuleType:
    import torch_ema

    return torch_ema


def torch_ema(module: Module) -> Running:
    average = import_torch_ema().ExponentialMovingAverage(
        module.parameters(), DECAY, use_num_updates=False
    )
    if is_half(module):
        average.to(dtype=torch.float32)

    def swap_in() -> None:
        average.store()
        average.copy_to()

    def swap_out() -> None:
        average.restore()
        average.collected_params = None

    return Running(average.update, lambda: average.shadow_params, swap_in, swap_out)


# Lightning. Its callbacks are made for a Trainer; of one they need the number of the step.


def import_lightning() -> ModuleType:
    import lightning.pytorch

    return lightning.pytorch


def as_lightning(module: Module) -> Module:
    """A LightningModule around the very same weights."""
    root = import_lightning().LightningModule()
    for name, child in module.named_children():
        root.add_module(name, child)
    return root


def lightning_swa(module: Module) -> Running:
    module = as_lightning(module)
    callback = import_lightning().callbacks.StochasticWeightAveraging
    average = copy.deepcopy(module)
    n_averaged = torch.tensor(0)
    return Running(
        lambda: callback.update_parameters(average, module, n_averaged, callback.avg_fn),
        average.parameters,
    )


def lightning_weight_averaging(module: Module) -> Running:
    module = as_lightning(module)
    callback = import_lightning().callbacks.WeightAveraging()
    callback.setup(SimpleNamespace(), module, "fit")
    trainer = SimpleNamespace(global_step=0)

    def update() -> None:
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, None, 0)

    return Running(
        update,
        lambda: callback._average_model.parameters(),
        lambda: callback.on_validation_epoch_start(trainer, module),
        lambda: callback.on_validation_epoch_end(trainer, module),
    )


# Updates that are none: who counts steps, and is told that none is due.


def torchcontrib_never(module: Module) -> Callable[[], object]:
    optimizer = import_torchcontrib().SWA(Idle(module.parameters()), swa_start=10**9, swa_freq=1)
    return optimizer.step


def ema_pytorch_never(module: Module) -> Callable[[], object]:
    update = ema_pytorch(module, update_every=10**9).update
    return _after_a_step_of(Idle(module.parameters()), update)


def lightning_never(module: Module) -> Callable[[], object]:
    module = as_lightning(module)
    callback = import_lightning().callbacks.EMAWeightAveraging(update_starting_at_step=10**9)
    callback.setup(SimpleNamespace(), module, "fit")
    trainer = SimpleNamespace(global_step=1)
    update = functools.partial(callback.on_train_batch_end, trainer, module, None, None, 0)
    return _after_a_step_of(Idle(module.parameters()), update)


def _after_a_step_of(
    optimizer: torch.optim.Optimizer, update: Callable[[], object]
) -> Callable[[], object]:
    def step() -> None:
        optimizer.step()
        update()

    return step


CEILING = Contender("C loop", c_loop, uniform, "a C compiler", ceiling.library)
CONTENDERS = [
    CEILING,
    Contender('swa_torch, nonfinite="keep"', ours("keep"), uniform),
    Contender('swa_torch, nonfinite="skip"', ours("skip"), uniform),
    Contender("AveragedModel", averaged_model(mixes_dtypes=True), uniform),
    Contender(
        "AveragedModel, swa_multi_avg",
        averaged_model(mixes_dtypes=False, multi_avg_fn=swa_utils.get_swa_multi_avg_fn()),
        uniform,
    ),
    Contender(
        "AveragedModel, ema_multi_avg",
        averaged_model(mixes_dtypes=False, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(DECAY)),
        moving,
    ),
    Contender("torchcontrib SWA", torchcontrib_swa, uniform, "torchcontrib", import_torchcontrib),
    Contender("timm ModelEmaV3", timm_v3, moving_from_initial, "timm", import_timm),
    Contender("ema-pytorch EMA", ema_pytorch, moving, "ema-pytorch", import_ema_pytorch),
    Contender("torch-ema", torch_ema, moving_from_initial, "torch-ema", import_torch_ema),
    Contender(
        "Lightning StochasticWeightAveraging",
        lightning_swa,
        uniform,
        "lightning",
        import_lightning,
    ),
    Contender(
        "Lightning WeightAveraging",
        lightning_weight_averaging,
        uniform,
        "lightning",
        import_lightning,
    ),
]

SKIPPING: dict[str, Callable[[Module], Callable[[], object]]] = {
    "torchcontrib SWA": torchcontrib_never,
    "ema-pytorch EMA": ema_pytorch_never,
    "Lightning WeightAveraging": lightning_never,
}


def by_name(name: str) -> Contender:
    """The contender of this name."""
    (found,) = [contender for contender in CONTENDERS if contender.name == name]
    return found
