"""One training through three frameworks: begun in PyTorch, continued in JAX, ended in Keras.

    python examples/move_average.py [--epochs 4] [--folder DIR]

A third of the epochs each, on scikit-learn's digits. Weights and average move on as files; at the
end all three networks hold the final average, and their predictions on the test images agree. What
the optimizers keep besides (momentum) stays behind.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import torch
from data import Data, load
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.tree_util import Partial

import swa_keras
import swa_optax
import swa_torch
from swa_core import SWAConfig

CONFIG = SWAConfig(start="25%", every="5step")
RATE, BATCH = 0.05, 32
AVERAGE, WEIGHTS = "average.safetensors", "weights.npz"

# The leaves, as the three call them.
TORCH = ("0.weight", "0.bias", "1.weight", "1.bias", "5.weight", "5.bias")
FLAX = (
    *("Conv_0/kernel", "Conv_0/bias", "BatchNorm_0/scale", "BatchNorm_0/bias"),
    *("Dense_0/kernel", "Dense_0/bias"),
)
KERAS = (
    *("digits/conv/kernel", "digits/conv/bias", "digits/norm/gamma", "digits/norm/beta"),
    *("digits/dense/kernel", "digits/dense/bias"),
)
FLAX_FROM_TORCH = dict(zip(FLAX, TORCH, strict=True))
KERAS_FROM_FLAX = dict(zip(KERAS, FLAX, strict=True))
FLAX_FROM_KERAS = dict(zip(FLAX, KERAS, strict=True))
TORCH_FROM_KERAS = dict(zip(TORCH, KERAS, strict=True))
# Kernels lie transposed in torch.
FROM_TORCH = {
    "Conv_0/kernel": lambda kernel: kernel.transpose(2, 3, 1, 0),
    "Dense_0/kernel": np.transpose,
}
TO_TORCH = {"0.weight": lambda kernel: kernel.transpose(3, 2, 0, 1), "5.weight": np.transpose}


def torch_network() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 10),
    )


class FlaxNetwork(nn.Module):
    @nn.compact
    def __call__(self, x, training: bool):
        x = nn.Conv(16, (3, 3), padding="VALID")(x)
        x = nn.BatchNorm(use_running_average=not training, momentum=0.9)(x)
        x = nn.avg_pool(nn.relu(x), (3, 3), (3, 3))
        # torch flattens channels first.
        return nn.Dense(10)(x.transpose(0, 3, 1, 2).reshape(len(x), -1))


def keras_network() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, name="conv"),
            keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name="norm"),
            keras.layers.ReLU(),
            keras.layers.AveragePooling2D(3),
            keras.layers.Permute((3, 1, 2)),
            keras.layers.Flatten(),
            keras.layers.Dense(10, name="dense"),
        ],
        name="digits",
    )


def in_torch(data: Data, epochs: int, lengths: dict[str, int], folder: Path) -> None:
    """Begins, and leaves weights and average in files."""
    torch.manual_seed(0)
    model = torch_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    optimizer = swa_torch.SWA(optimizer, CONFIG, **lengths)
    rng = np.random.default_rng(0)
    for _ in range(epochs):
        for x, y in data.batches(BATCH, rng):
            optimizer.zero_grad()
            logits = model(images(x))
            torch.nn.functional.cross_entropy(logits, torch.from_numpy(y).long()).backward()
            optimizer.step()
    optimizer.save_average(folder / AVERAGE, model)
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    np.savez(folder / WEIGHTS, **weights)
    print(f"torch: {optimizer.updates} updates, {optimizer.n_averaged} snapshots")


def in_jax(data: Data, epochs: int, lengths: dict[str, int], folder: Path) -> None:
    """Goes on from torch's files, and leaves its own."""
    network = FlaxNetwork()
    variables = network.init(jax.random.key(0), jnp.asarray(data.train_x[:1]), training=False)
    batch_stats = variables["batch_stats"]
    weights = dict(np.load(folder / WEIGHTS))
    weights = {leaf: weights[name] for leaf, name in FLAX_FROM_TORCH.items()}
    weights |= {leaf: change(weights[leaf]) for leaf, change in FROM_TORCH.items()}
    params = unflatten_dict({tuple(leaf.split("/")): jnp.array(w) for leaf, w in weights.items()})
    tx = optax.chain(optax.sgd(RATE, momentum=0.9), swa_optax.swa(CONFIG, **lengths))
    opt_state = swa_optax.load_average(
        folder / AVERAGE,
        tx.init(params),
        config=CONFIG,
        schedule=CONFIG.schedule(**lengths),
        names=FLAX_FROM_TORCH,
        transform=FROM_TORCH,
    )

    def loss(params, batch_stats, x, y):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, new = network.apply(variables, x, training=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), new["batch_stats"]

    @jax.jit
    def step(params, batch_stats, opt_state, x, y):
        grads, batch_stats = jax.grad(loss, has_aux=True)(params, batch_stats, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), batch_stats, opt_state

    rng = np.random.default_rng(1)
    for _ in range(epochs):
        for x, y in data.batches(BATCH, rng):
            params, batch_stats, opt_state = step(params, batch_stats, opt_state, x, y)
    swa_optax.save_average(folder / AVERAGE, opt_state, CONFIG, schedule=CONFIG.schedule(**lengths))
    flat = flatten_dict(params, sep="/")
    np.savez(folder / WEIGHTS, **flat)
    print(f"jax: {swa_optax.n_averaged(opt_state)} snapshots")


def in_keras(data: Data, epochs: int, lengths: dict[str, int], folder: Path) -> None:
    """Goes on from JAX' files, and leaves the average."""
    model = keras_network()
    weights = dict(np.load(folder / WEIGHTS))
    for variable in model.trainable_variables:
        variable.assign(weights[KERAS_FROM_FLAX[variable.path]])
    swa = swa_keras.SWA.load(
        folder / AVERAGE, model=model, names=KERAS_FROM_FLAX, bn_data=data.for_bn
    )
    model.compile(
        keras.optimizers.SGD(RATE, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    steps = lengths["steps_per_epoch"]
    done = lengths["total_steps"] // steps - epochs
    model.fit(
        *(data.train_x, data.train_y),
        batch_size=BATCH,
        initial_epoch=done,
        epochs=done + epochs,
        callbacks=[swa],
        verbose=0,
    )
    swa.save(folder / AVERAGE)
    print(f"keras: {swa.updates} updates, {swa.n_averaged} snapshots")


def predictions(data: Data, lengths: dict[str, int], folder: Path) -> dict[str, np.ndarray]:
    """The logits of the test images [images, 10], by networks that hold the final average."""
    file = folder / AVERAGE
    in_keras = keras_network()
    swa_keras.SWA.load(file).finalize(in_keras, bn_data=data.for_bn)

    in_torch = torch_network()
    inner = torch.optim.SGD(in_torch.parameters())
    optimizer = swa_torch.SWA(inner, CONFIG, **lengths)
    optimizer.load_average(file, in_torch, names=TORCH_FROM_KERAS, transform=TO_TORCH)
    optimizer.finalize(in_torch, bn_data=images(data.for_bn).split(1000))

    in_jax = FlaxNetwork()
    variables = in_jax.init(jax.random.key(1), jnp.asarray(data.train_x[:1]), training=False)
    params, batch_stats = variables["params"], variables["batch_stats"]
    opt_state = swa_optax.swa(CONFIG, **lengths).init(params)
    opt_state = swa_optax.load_average(file, opt_state, names=FLAX_FROM_KERAS)
    averaged = swa_optax.averaged_params(opt_state, params)
    apply = Partial(partial(forward, in_jax), averaged)
    batch_stats = swa_optax.update_bn(apply, batch_stats, [data.for_bn])
    variables = {"params": averaged, "batch_stats": batch_stats}

    with torch.no_grad():
        return {
            "keras": in_keras.predict(data.test_x, verbose=0),
            "torch": in_torch.eval()(images(data.test_x)).numpy(),
            "jax": np.array(in_jax.apply(variables, data.test_x, training=False)),
        }


def images(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def forward(network, params, batch_stats, x):
    """The batch statistics after one forward pass in training mode, for update_bn."""
    variables = {"params": params, "batch_stats": batch_stats}
    return network.apply(variables, x, training=True, mutable=["batch_stats"])[1]["batch_stats"]


def move(data: Data, epochs: int, folder: Path) -> dict[str, np.ndarray]:
    """The whole journey."""
    steps = data.steps_per_epoch(BATCH)
    lengths = {"steps_per_epoch": steps, "total_steps": 3 * epochs * steps}
    for part in (in_torch, in_jax, in_keras):
        part(data, epochs, lengths, folder)
    return predictions(data, lengths, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4, help="in each framework")
    parser.add_argument("--folder", type=Path, help="for the files (default: a temporary one)")
    options = parser.parse_args()
    data = load("digits")
    with tempfile.TemporaryDirectory() as temporary:
        logits = move(data, options.epochs, options.folder or Path(temporary))
    for name, found in logits.items():
        accuracy = (found.argmax(1) == data.test_y).mean()
        distance = max(np.abs(found - other).max() for other in logits.values())
        print(f"{name}: test accuracy {accuracy:.3f}, logits differ by {distance:.1e} at most")


if __name__ == "__main__":
    main()
