"""The networks of the experiments in JAX, with flax linen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments import networks
from experiments.networks import BN_EPSILON, BN_KEEP, NETWORKS, VGG, PreResNet

Variables = dict[str, dict[str, jax.Array]]


class Network(nn.Module):
    """A network; its layers are named by their place in ``networks.weights``.

    Attributes:
      description: of its body.
      classes: how many there are.
    """

    description: VGG | PreResNet
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        """Images [batch, height, width, channels] to logits [batch, classes]."""
        places = iter(range(10**4))

        def name() -> str:
            return f"{next(places):04d}"

        def conv(x: jax.Array, out: int, size: int, stride: int = 1) -> jax.Array:
            edge = size // 2
            layer = nn.Conv(out, (size, size), stride, padding=edge, use_bias=False, name=name())
            return layer(x)

        def norm(x: jax.Array) -> jax.Array:
            layer = nn.BatchNorm(not training, momentum=BN_KEEP, epsilon=BN_EPSILON, name=name())
            return nn.relu(layer(x))

        def vgg(network: VGG, x: jax.Array) -> jax.Array:
            for stage in network.stages:
                for out in stage:
                    x = norm(conv(x, out, 3))
                x = halved(x)
            return x

        def preresnet(network: PreResNet, x: jax.Array) -> jax.Array:
            x = conv(x, network.stem, 3, network.stem_stride)
            for out, stride in network.blocks:
                y = norm(x)
                inside = conv(norm(conv(y, out, 3, stride)), out, 3)
                if (x.shape[-1], 1) != (out, stride):
                    x = conv(y, out, 1, stride)
                x = x + inside
            return norm(x)

        body = vgg if isinstance(self.description, VGG) else preresnet
        x = body(self.description, x).mean(axis=(1, 2))
        return nn.Dense(self.classes, name=name())(x)


def halved(x: jax.Array) -> jax.Array:
    """The maxima of 2 x 2 pixels; an odd edge is left out.

    The gradient of ``nn.max_pool`` is a scatter, which XLA on a CPU makes slowly.
    """
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def build(
    name: str, channels: int, classes: int, seed: int
) -> tuple[Network, Variables, Variables]:
    """A network, its initial weights of a seed, and its initial batch-norm statistics."""
    leaves = iter(networks.weights(name, channels, classes, seed))
    params: Variables = {}
    stats: Variables = {}
    for place, leaf in enumerate(leaves):
        layer = f"{place:04d}"
        if leaf.ndim == 1:
            params[layer] = {"scale": jnp.array(leaf), "bias": jnp.array(next(leaves))}
            stats[layer] = {"mean": jnp.zeros(leaf.shape), "var": jnp.ones(leaf.shape)}
        else:
            params[layer] = {"kernel": jnp.array(leaf)}
        if leaf.ndim == 2:
            params[layer]["bias"] = jnp.array(next(leaves))
    return Network(NETWORKS[name], classes), params, stats


def leaves(params: Variables) -> list[np.ndarray]:
    """Weights in the order of ``networks.weights``."""
    layers = [layer for _, layer in sorted(params.items())]
    names = ("kernel", "scale", "bias")
    return [np.array(layer[name]) for layer in layers for name in names if name in layer]
