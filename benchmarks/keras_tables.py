"""The tables beside those of ``fit``: a snapshot, swapping, and a batch that is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
from keras_contenders import CEILING, CONTENDERS, Contender, Running, uniform
from keras_sets import MovingWeights, Weighted, elements, host, shapes_of
from timing import Table, interleaved

from swa_keras import SWA

# Of averages in float32, after some 25 snapshots of weights that differ by a factor of 2.
TOLERANCE = 1e-6
CALLS = 1000


@dataclass
class Bench:
    """How to measure.

    Attributes:
      rounds: rounds that count.
      tiny: whether sets keep their number of variables, but none of their size.
      absent: who cannot run here, and why.
    """

    rounds: int
    tiny: bool
    absent: dict[str, str]

    def here(self, *, use_ema: bool = False) -> list[Contender]:
        """Who runs on a model whose optimizer averages, or on one whose does not."""
        return [c for c in CONTENDERS if c.use_ema == use_ema and c.name not in self.absent]

    def cool(self) -> Callable[[], object]:
        """Something that empties the caches, on one thread."""
        scratch = np.zeros((1 if self.tiny else 128) << 18, np.float32)
        return lambda: np.add(scratch, 1, out=scratch)

    def title(self, what: str, name: str, dtype: str) -> str:
        """What is measured on which set."""
        shapes = shapes_of(name, tiny=self.tiny)
        return (
            f"{what}: {name}, {len(shapes)} variables, "
            f"{elements(shapes) / 1e6:.1f} M {dtype} weights"
        )


def snapshots(bench: Bench, name: str, dtype: str) -> Table:
    """One snapshot in a loop of one's own, by everybody."""
    shapes = shapes_of(name, tiny=bench.tiny)
    model = Weighted(shapes, dtype)
    weights = MovingWeights(model)
    running = {contender.name: contender.build(model) for contender in bench.here()}
    alone = running.get(CEILING)
    times = interleaved(
        {contender: each.update for contender, each in running.items()},
        bench.rounds,
        before_round=weights.move,
        before_each=bench.cool(),
    )
    errors = {}
    for contender, each in running.items():
        if each is not alone:  # whose weights do not move
            errors[contender] = weights.error(each.averages(), uniform)
            error = errors[contender]
            assert error < TOLERANCE, f"{contender}: the average is off by {error:.1e}"
    out = Table(
        bench.title("A snapshot", name, dtype),
        times,
        _base(times),
        absent=bench.absent,
        about={"kind": "snapshot", "of": f"{name}, {dtype}"},
    )
    out.column("fastest", out.fastest(), "{:.2f}")
    out.column("error", errors, "{:.0e}")
    traffic = elements(shapes) * (10 if dtype == "bfloat16" else 12)
    out.column(
        "GB/s", {who: traffic / seconds / 1e9 for who, seconds in out.medians().items()}, "{:.1f}"
    )
    return out


def swapping(bench: Bench, name: str) -> Table:
    """The average into the model and the weights back."""
    shapes = shapes_of(name, tiny=bench.tiny)
    model = Weighted(shapes, "float32")
    of_ema = Weighted(shapes, "float32", keras.optimizers.SGD(0.0, use_ema=True))
    running = {c.name: (model, c.build(model)) for c in bench.here()}
    running |= {c.name: (of_ema, c.build(of_ema)) for c in bench.here(use_ema=True)}
    # The two ways of ours differ in nothing here.
    running = {
        name: pair
        for name, pair in running.items()
        if pair[1].swap_in is not None and not name.endswith('"skip"')
    }
    weights = MovingWeights(model)
    for _ in range(2):
        weights.move()
        for _, each in running.values():
            each.update()

    def there_and_back(each: Running) -> Callable[[], None]:
        assert each.swap_in is not None
        assert each.swap_out is not None

        def run() -> None:
            each.swap_in()
            each.swap_out()

        return run

    times = interleaved(
        {who: there_and_back(each) for who, (_, each) in running.items()},
        bench.rounds,
        before_each=bench.cool(),
    )
    errors = {}
    for who, (of, each) in running.items():
        if who == CEILING:
            continue
        live, averages = [host(v) for v in of.trainable_variables], each.averages()
        each.swap_in()
        inside = [host(v) for v in of.trainable_variables]
        each.swap_out()
        after = [host(v) for v in of.trainable_variables]
        errors[who] = max(_largest(inside, averages), _largest(after, live))
        if who.startswith("swa_keras"):
            assert errors[who] == 0, f"{who} does not swap bit for bit"
    out = Table(
        bench.title("In and out", name, "float32"),
        times,
        _base(times),
        absent=bench.absent,
        about={"kind": "swap", "of": f"{name}, float32"},
    )
    out.column("fastest", out.fastest(), "{:.2f}")
    out.column("error", errors, "{:.0e}")
    return out


def skipped_updates(bench: Bench) -> Table:
    """What the hooks of a batch cost that takes no snapshot, beside those that do nothing."""
    model = Weighted(shapes_of("transformer", tiny=True), "float32")
    config = {"start": "1000000000step", "every": "1step"}
    bare, in_fit, in_loop = keras.callbacks.Callback(), SWA(config), SWA(config)
    in_fit.set_model(model)
    in_fit.set_params({"epochs": 1, "steps": CALLS * (bench.rounds + 2) * 10**9})
    in_fit.on_train_begin()
    in_fit.on_epoch_begin(0)

    def batches(callback: keras.callbacks.Callback) -> Callable[[], None]:
        def run() -> None:
            for batch in range(CALLS):
                callback.on_train_batch_begin(batch)
                callback.on_train_batch_end(batch)

        return run

    def updates() -> None:
        for _ in range(CALLS):
            in_loop.update(model)

    names = ("a callback that does nothing", "swa_keras, the hooks of fit", "swa_keras, update()")
    times = interleaved(
        dict(zip(names, (batches(bare), batches(in_fit), updates), strict=True)), bench.rounds
    )
    assert in_fit.n_averaged == in_loop.n_averaged == 0
    assert in_loop.updates == CALLS * (bench.rounds + 1)
    about = {"kind": "skipped", "of": "a batch"}
    out = Table("A batch that takes no snapshot", times, names[0], CALLS, about=about)
    base = out.medians()[names[0]]
    out.column("us more", {n: 1e6 * (s - base) for n, s in out.medians().items()}, "{:.2f}")
    return out


def _base(times: dict[str, list[float]]) -> str | None:
    return CEILING if CEILING in times else None


def _largest(some: list, others: list) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(some, others, strict=True))
