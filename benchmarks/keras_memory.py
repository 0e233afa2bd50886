"""Memory and page faults of averaging in Keras, each contender in a process of its own.

    KERAS_BACKEND=jax python benchmarks/keras_memory.py 'C loop' float32|bfloat16|swap|fit [--tiny]

What the kernel says of the process's resident memory is what counts, not what anybody's allocator
reports. With "fit", a contender of ``keras_fit`` is measured while it runs. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from typing import TypedDict

from memory import CLEAR_REFS, give_back, kilobytes, peak_of

UPDATES = 5
SET = "transformer"


class Figures(TypedDict, total=False):
    """What was measured; in copies of the weights in float32, and in faults.

    Attributes:
      held: what the average keeps, from update to update.
      peak: what an update takes besides, while it runs.
      swapped: what is held besides while the average is in the model.
      swap_peak: what swapping in, and out again, takes besides at the most.
      faults: minor page faults of an update.
      fit: the most that is resident while ``fit`` averages, over that of plain training.
      failed: why there are no figures.
    """

    held: float
    peak: float
    swapped: float
    swap_peak: float
    faults: float
    fit: float
    failed: str


def measure_all(
    requests: Sequence[tuple[str, str]], *, tiny: bool = False, apart: bool = True
) -> list[Figures]:
    """The figures of each request: a contender, and a dtype, "swap" or "fit".

    From processes of their own, or from this one, where they mean nothing.
    """
    if not CLEAR_REFS.exists():
        return [Figures(failed="needs Linux") for _ in requests]
    take = _measured if apart else measure
    return [take(who, what, tiny=tiny) for who, what in requests]


def measure(who: str, what: str, *, tiny: bool) -> Figures:
    """The figures of one contender, in this process."""
    if what == "fit":
        return while_fitting(who, tiny=tiny)
    return standing_alone(who, "float32" if what == "swap" else what, tiny=tiny)


def _measured(who: str, what: str, *, tiny: bool) -> Figures:
    command = [sys.executable, __file__, who, what, *(["--tiny"] if tiny else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"]
        return Figures(failed=lines[-1])
    return json.loads(done.stdout.splitlines()[-1])


def standing_alone(who: str, dtype: str, *, tiny: bool) -> Figures:
    """Of an average in a loop of one's own."""
    import keras
    from keras_contenders import by_name, wait_for
    from keras_sets import Weighted, elements, shapes_of

    contender = by_name(who)
    ema = {"use_ema": True} if contender.use_ema else {}
    # What the first use of anything loads is no average.
    _use_once(contender.build(Weighted([(1,)], dtype, keras.optimizers.SGD(0.0, **ema))))
    shapes = shapes_of(SET, tiny=tiny)
    copy = 4 * elements(shapes)
    model = Weighted(shapes, dtype, keras.optimizers.SGD(0.0, **ema))
    wait_for(model)
    give_back()
    before = kilobytes("VmRSS")
    running = contender.build(model)
    for _ in range(2):
        running.update()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(UPDATES):
        running.update()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    give_back()
    figures = Figures()
    if not contender.use_ema:  # whose average came with the optimizer
        figures = Figures(
            held=1024 * (kilobytes("VmRSS") - before) / copy,
            faults=faults / UPDATES,
            peak=peak_of(running.update) / copy,
        )
    swap_in, swap_out = running.swap_in, running.swap_out
    if swap_in is not None and swap_out is not None:

        def swap() -> None:
            swap_in()
            swap_out()

        swap()
        figures["swap_peak"] = peak_of(swap) / copy
        give_back()
        before = kilobytes("VmRSS")
        swap_in()
        give_back()
        figures["swapped"] = 1024 * (kilobytes("VmRSS") - before) / copy
    return figures


def _use_once(running: object) -> None:
    running.update()
    running.update()
    if running.swap_in is not None:
        running.swap_in()
        running.swap_out()


def while_fitting(who: str, *, tiny: bool) -> Figures:
    """Of a callback while ``fit`` runs, and validates on the average if it is ours.

    Keras' own average belongs to the optimizer, and cannot be added to a training that runs.
    """
    from keras_fit import SCHEDULES, NumpyMean, Training
    from keras_sets import elements

    from swa_keras import SWA

    def callback() -> object:
        return SWA(SCHEDULES[who], finalize=False) if who in SCHEDULES else NumpyMean()

    # What the first use of anything loads is no average.
    small = Training(tiny=True, callback=callback())
    for _ in range(2):
        small.epoch(validation_data=small.validation_data)
    plain = Training(tiny=tiny)
    data = plain.validation_data
    for _ in range(2):
        plain.epoch(validation_data=data)
    of_plain = peak_of(lambda: plain.epoch(validation_data=data))
    copy = 4 * elements([tuple(v.shape) for v in plain.model.trainable_variables])
    plain.callbacks = [callback()]
    give_back()
    before = kilobytes("VmRSS")
    for _ in range(2):
        plain.epoch(validation_data=data)
    give_back()
    held = 1024 * (kilobytes("VmRSS") - before)
    peak = peak_of(lambda: plain.epoch(validation_data=data))
    return Figures(held=held / copy, fit=(held + peak - of_plain) / copy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender")
    parser.add_argument("what")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    figures = measure(options.contender, options.what, tiny=options.tiny)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
