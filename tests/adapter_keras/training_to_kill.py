"""A training with backups, started again and again, each time in a new process, by a fork.

Reads a line of JSON for each start, ``{"backup": FOLDER, "output": FILE}``, and answers with the
child's id; then another line, upon which it waits for the child's end and answers with its status.
(Until then the id is nobody else's.) Nothing is computed here: no runtime of a framework would
survive the fork.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import keras
import numpy as np

from swa_core import EMA, LearningRate, SWAConfig
from swa_keras import SWA
from swa_keras.backend import current

EPOCHS, STEPS = 14, 4
CONFIG = SWAConfig(
    start="2ep", every="3step", rule=EMA(0.9), lr=LearningRate(value=0.01, anneal="9ep")
)


def train(folder: Path) -> str:
    """Trains to the end; some characters that tell any two results apart."""
    random = np.random.default_rng(0)
    x = random.normal(size=(24, 4)).astype("float32")
    y = x.sum(axis=1, keepdims=True)
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.Adam(0.02), "mse")
    swa = SWA(CONFIG, bn_data=(x, y), finalize=False)
    model.fit(
        x,
        y,
        batch_size=24 // STEPS,
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        validation_data=(x, y),
        callbacks=[swa, swa.backup(folder)],
    )
    bits = hashlib.sha256()
    variables = [*model.variables, *model.optimizer.variables]
    arrays = [current().to_numpy(keras.ops.convert_to_tensor(v)) for v in variables]
    state = swa.state_dict()
    for array in (*arrays, *state["average"]):
        bits.update(array.tobytes())
    counters = {k: v for k, v in state.items() if k not in ("average", "live", "paths")}
    return f"{bits.hexdigest()[:16]} {json.dumps(counters, sort_keys=True)}"


def run(backup: str, output: str) -> None:
    """The child; a file beside the output tells that it came to its end."""
    status = 1
    with open(output, "a", encoding="utf-8") as file:
        try:
            print(train(Path(backup)), file=file)
            status = 0
        except BaseException:
            traceback.print_exc(file=file)
    Path(f"{output}.ended").touch()
    os._exit(status)


def main() -> None:
    warnings.filterwarnings("ignore", message="os.fork")
    print("ready", flush=True)
    while line := sys.stdin.readline():
        child = os.fork()
        if not child:
            run(**json.loads(line))
        print(child, flush=True)
        sys.stdin.readline()
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
