# mypy: disable-error-code="import-not-found,attr-defined", allow-untyped-decorators
"""NumPyro: its VAE example (stax networks, SVI, jitted loop over batches) with the analytic KL and logits.

Source: https://num.pyro.ai/en/stable/examples/vae.html.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from bench.rivals import Work

# first: it sets XLA's threads before jax is imported
from bench.rivals.jax_loop import jax, jnp  # isort: skip
import numpyro
import numpyro.distributions as dist
from jax.example_libraries import stax

REQUIRES = ("numpyro", "jax")


def _network(shapes: list[tuple[int, int]]) -> Any:
    layers = [layer for _, outputs in shapes for layer in (stax.Dense(outputs), stax.Relu)]
    return stax.serial(*layers[:-1])


class Provider:
    def __init__(self, work: Work) -> None:
        self.work = work
        self.train, self.test = jnp.asarray(work.load("train")), jnp.asarray(work.load("test"))
        self.per_epoch = len(self.train) // work.batch_size
        data_dim = self.train.shape[1]
        encoder, decoder = _network(work.encoder(data_dim)), _network(work.decoder(data_dim))

        def model(x: Any) -> None:
            decode = numpyro.module("decoder", decoder, (len(x), work.latent_dim))
            with numpyro.plate("batch", len(x)):
                z = numpyro.sample("z", dist.Normal(0, 1).expand([work.latent_dim]).to_event(1))
                likelihood = dist.Bernoulli(logits=decode(z), validate_args=False)
                numpyro.sample("obs", likelihood.to_event(1), obs=x)

        def guide(x: Any) -> None:
            mu, logvar = jnp.split(numpyro.module("encoder", encoder, x.shape)(x), 2, axis=-1)
            with numpyro.plate("batch", len(x)):
                numpyro.sample("z", dist.Normal(mu, jnp.exp(0.5 * logvar)).to_event(1))

        adam = numpyro.optim.Adam(work.lr)
        self.svi = numpyro.infer.SVI(model, guide, adam, numpyro.infer.TraceMeanField_ELBO())
        self.key = jax.random.key(0)
        first = self.train[: work.batch_size].astype(jnp.float32) / 255.0
        self.state = self.svi.init(self.key, first)
        self.order, self.left = None, 0
        self.shuffle = jax.jit(lambda key: jax.random.permutation(key, len(self.train)))

    def _batch(self, rows: Any, key: Any) -> Any:
        x = rows.astype(jnp.float32) / 255.0
        return jax.random.bernoulli(key, x).astype(jnp.float32) if self.work.binarize == "dynamic" else x

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def _steps(self, state: Any, train: Any, order: Any, key: Any, first: Any, count: Any) -> Any:
        batch = self.work.batch_size

        def body(i: Any, state: Any) -> Any:
            rows = train[jax.lax.dynamic_slice_in_dim(order, (first + i) * batch, batch)]
            return self.svi.update(state, self._batch(rows, jax.random.fold_in(key, i)))[0]

        return jax.lax.fori_loop(0, count, body, state)

    def run(self, steps: int) -> None:
        while steps:
            if self.left == 0:
                self.key, key = jax.random.split(self.key)
                self.order, self.left = self.shuffle(key), self.per_epoch
            count = min(steps, self.left)
            first = self.per_epoch - self.left
            self.state = self._steps(self.state, self.train, self.order, self.key, first, count)
            self.left, steps = self.left - count, steps - count
        jax.block_until_ready(self.state)

    def test_negative_elbo(self) -> float:
        total = 0.0
        for first in range(0, len(self.test), 1000):
            x = self._batch(self.test[first : first + 1000], jax.random.fold_in(self.key, first))
            total += float(self.svi.evaluate(self.state, x))
        return total / len(self.test)
