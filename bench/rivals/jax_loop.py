# mypy: disable-error-code="import-not-found", allow-untyped-decorators
"""The same training in JAX by hand: data on the device, whole stretches of steps in one jitted loop, Adam by XLA.

Threads: with one, the process is pinned to one core and XLA's thread pool is switched off.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from bench.rivals import Work

REQUIRES = ("jax",)

if os.environ.get("OMP_NUM_THREADS") == "1":
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import jax  # noqa: E402  (after XLA_FLAGS)
import jax.numpy as jnp  # noqa: E402

Layers = list[tuple[Any, Any]]


def _init(key: Any, shapes: list[tuple[int, int]]) -> Layers:
    """torch.nn.Linear's initial weights, `[inputs, outputs]`."""
    layers = []
    for n, (inputs, outputs) in enumerate(shapes):
        keys, bound = jax.random.split(jax.random.fold_in(key, n)), inputs**-0.5
        shape = (inputs, outputs)
        weight = jax.random.uniform(keys[0], shape, minval=-bound, maxval=bound)
        layers.append((weight, jax.random.uniform(keys[1], (outputs,), minval=-bound, maxval=bound)))
    return layers


def _mlp(layers: Layers, x: Any) -> Any:
    for weight, bias in layers[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    return x @ layers[-1][0] + layers[-1][1]


def _negative_elbo(params: tuple[Layers, Layers], x: Any, key: Any) -> Any:
    """Mean over the batch, in nats."""
    mu, logvar = jnp.split(_mlp(params[0], x), 2, axis=-1)
    z = mu + jnp.exp(0.5 * logvar) * jax.random.normal(key, mu.shape)
    logits = _mlp(params[1], z)
    nll = jnp.maximum(logits, 0) - logits * x + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    kl = -0.5 * (1 + logvar - mu**2 - jnp.exp(logvar))
    return (nll.sum() + kl.sum()) / len(x)


def _adam(lr: float, params: Any, grads: Any, m: Any, v: Any, t: Any) -> tuple[Any, Any, Any]:
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, grads)
    scale, root = lr / (1 - 0.9**t), jnp.sqrt(1 - 0.999**t)
    return jax.tree.map(lambda p, m, v: p - scale * m / (jnp.sqrt(v) / root + 1e-8), params, m, v), m, v


class Provider:
    def __init__(self, work: Work) -> None:
        self.work = work
        self.train, self.test = jnp.asarray(work.load("train")), jnp.asarray(work.load("test"))
        data_dim = self.train.shape[1]
        keys = jax.random.split(jax.random.key(0), 3)
        params = _init(keys[0], work.encoder(data_dim)), _init(keys[1], work.decoder(data_dim))
        zeros = jax.tree.map(jnp.zeros_like, params)
        self.state = (params, zeros, jax.tree.map(jnp.copy, zeros), jnp.zeros((), jnp.int32))
        self.key, self.order, self.left = keys[2], None, 0
        self.shuffle = jax.jit(lambda key: jax.random.permutation(key, len(self.train)))

    def _batch(self, rows: Any, key: Any) -> Any:
        x = rows.astype(jnp.float32) / 255.0
        return jax.random.bernoulli(key, x).astype(jnp.float32) if self.work.binarize == "dynamic" else x

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def _steps(self, state: Any, train: Any, order: Any, key: Any, first: Any, count: Any) -> Any:
        batch = self.work.batch_size

        def body(i: Any, state: Any) -> Any:
            params, m, v, t = state
            rows = train[jax.lax.dynamic_slice_in_dim(order, (first + i) * batch, batch)]
            noise_key, data_key = jax.random.split(jax.random.fold_in(key, t))
            grads = jax.grad(_negative_elbo)(params, self._batch(rows, data_key), noise_key)
            return *_adam(self.work.lr, params, grads, m, v, t + 1.0), t + 1

        return jax.lax.fori_loop(0, count, body, state)

    def run(self, steps: int) -> None:
        per_epoch = len(self.train) // self.work.batch_size
        while steps:
            if self.left == 0:
                self.key, key = jax.random.split(self.key)
                self.order, self.left = self.shuffle(key), per_epoch
            count = min(steps, self.left)
            self.state = self._steps(self.state, self.train, self.order, self.key, per_epoch - self.left, count)
            self.left, steps = self.left - count, steps - count
        jax.block_until_ready(self.state)

    def test_negative_elbo(self) -> float:
        total = 0.0
        for first in range(0, len(self.test), 1000):
            noise_key, data_key = jax.random.split(jax.random.fold_in(self.key, first))
            x = self._batch(self.test[first : first + 1000], data_key)
            total += float(_negative_elbo(self.state[0], x, noise_key)) * len(x)
        return total / len(self.test)
