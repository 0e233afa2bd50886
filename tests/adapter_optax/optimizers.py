"""Every optimizer of optax and optax.contrib, each as a function that makes it.

``nothing_missing`` finds what optax has besides, so that a new one cannot be overlooked.
"""

from __future__ import annotations

import inspect
import warnings

import jax
import jax.numpy as jnp
import optax
from adapter_optax.training import quick_jit
from optax import contrib

SGD = optax.sgd(0.1)


def private_sgd():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it calls its own deprecated argument
        return contrib.dpsgd(0.1, l2_norm_clip=1.0, noise_multiplier=0.1, seed=0)


OPTIMIZERS = {
    "adabelief": lambda: optax.adabelief(0.1),
    "adadelta": lambda: optax.adadelta(0.1),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "adagrad": lambda: optax.adagrad(0.1),
    "adam": lambda: optax.adam(0.1),
    "adamax": lambda: optax.adamax(0.1),
    "adamaxw": lambda: optax.adamaxw(0.1),
    "adamw": lambda: optax.adamw(0.1),
    "adan": lambda: optax.adan(0.1),
    "amsgrad": lambda: optax.amsgrad(0.1),
    "fromage": lambda: optax.fromage(0.1),
    "lamb": lambda: optax.lamb(0.1),
    "lars": lambda: optax.lars(0.1),
    "lbfgs": lambda: optax.lbfgs(0.1, linesearch=None),
    "lion": lambda: optax.lion(0.1),
    "nadam": lambda: optax.nadam(0.1),
    "nadamw": lambda: optax.nadamw(0.1),
    "noisy_sgd": lambda: optax.noisy_sgd(0.1, key=0),
    "novograd": lambda: optax.novograd(0.1),
    "optimistic_adam_v2": lambda: optax.optimistic_adam_v2(0.1),
    "optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(0.1),
    "polyak_sgd": optax.polyak_sgd,
    "radam": lambda: optax.radam(0.1),
    "rmsprop": lambda: optax.rmsprop(0.1, momentum=0.9),
    "rprop": lambda: optax.rprop(0.1),
    "sgd": lambda: optax.sgd(0.1),
    "sign_sgd": lambda: optax.sign_sgd(0.1),
    "signum": lambda: optax.signum(0.1),
    "sm3": lambda: optax.sm3(0.1),
    "yogi": lambda: optax.yogi(0.1),
    # optax.contrib
    "acprop": lambda: contrib.acprop(0.1),
    "ademamix": lambda: contrib.ademamix(0.1),
    "adopt": lambda: contrib.adopt(0.1),
    "cocob": lambda: contrib.cocob(),
    "dadapt_adamw": lambda: contrib.dadapt_adamw(0.1),
    "differentially_private_aggregate": lambda: optax.chain(
        contrib.differentially_private_aggregate(1.0, 0.1, key=0), optax.adam(0.1)
    ),
    "dog": lambda: contrib.dog(1.0),
    "dowg": lambda: contrib.dowg(1.0),
    "dpsgd": private_sgd,
    "galore": lambda: contrib.galore(0.1, rank=1),
    "madgrad": lambda: contrib.madgrad(0.1),
    "mechanize": lambda: contrib.mechanize(SGD),
    "momo": lambda: contrib.momo(0.1),
    "momo_adam": lambda: contrib.momo_adam(0.1),
    "muon": lambda: contrib.muon(0.1),
    "normalize": lambda: optax.chain(contrib.normalize(), SGD),
    "prodigy": lambda: contrib.prodigy(0.1),
    "reduce_on_plateau": lambda: optax.chain(SGD, contrib.reduce_on_plateau()),
    "sam": lambda: contrib.sam(SGD, optax.chain(contrib.normalize(), SGD)),
    "schedule_free": lambda: contrib.schedule_free(SGD, learning_rate=0.1),
    "schedule_free_adamw": lambda: contrib.schedule_free_adamw(0.1),
    "schedule_free_sgd": lambda: contrib.schedule_free_sgd(0.1),
    "simplified_ademamix": lambda: contrib.simplified_ademamix(0.1),
    "sophia": lambda: contrib.sophia(0.1),
    "split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(SGD),
}

# What is no optimizer of its own, or stands under another name.
BESIDES = {
    "optimistic_adam": "deprecated for optimistic_adam_v2",
    "hutchinson_estimator_diag_hessian": "a part of sophia",
    "schedule_free_eval_params": "reads a state",
}

# Those that ask for per-example gradients, which have an axis more.
PER_EXAMPLE = {"differentially_private_aggregate", "dpsgd"}


def unlisted():
    """The optimizers that optax has and this file does not."""
    found = {
        name
        for name, function in inspect.getmembers(optax, callable)
        if getattr(function, "__module__", None) == "optax._src.alias"
    } | {name for name, _ in inspect.getmembers(contrib, inspect.isfunction)}
    parts = {name for name in found if name.startswith("scale_by_")}
    return found - parts - OPTIMIZERS.keys() - BESIDES.keys()


def loss(w):
    return jnp.sum(jnp.square(w - 0.5) * jnp.array([[1.0, 2.0, 3.0]]))


def training(tx, name):
    """A function of the number of steps to (updates, parameters and state) of each, jitted."""

    @quick_jit
    def step(w, state):
        value, grad = jax.value_and_grad(loss)(w)
        extra = {} if name == "sam" else {"unknown": 1}
        if name in ("momo", "momo_adam", "polyak_sgd", "reduce_on_plateau"):
            extra["value"] = value
        if name == "sophia":
            extra["obj_fn"] = loss
        if name in PER_EXAMPLE:
            grad = jnp.stack([grad, 2 * grad])
        updates, state = optax.with_extra_args_support(tx).update(grad, state, w, **extra)
        return updates, optax.apply_updates(w, updates), state

    def run(n):
        w = jnp.array([[1.0, -2.0, 0.25], [0.0, 3.0, -1.0]])
        state, seen = tx.init(w), []
        for _ in range(n):
            updates, w, state = step(w, state)
            seen.append((updates, w))
        return seen, state, step._cache_size()

    return run
