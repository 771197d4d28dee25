"""The variational autoencoder.

The model of the paper (Kingma & Welling 2013, Appendix C): q(z|x) = N(mu(x), sigma^2(x)), prior N(0, I), p(x|z)
Bernoulli or Gaussian, with encoders and decoders of `fastvae.networks` or others.

Any `nn.Module` that maps data `[B, D]` to `[B, 2 L]` (mu, then logvar) is an encoder, any that maps latents `[..., L]`
to the parameters of a likelihood `[..., outputs_per_element * D]` is a decoder: `VAE(encoder, decoder, likelihood)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvae import objectives
from fastvae._checks import draw_seed
from fastvae._mlp_loss import AtHand, Layers, autograd_does_more, mlp_loss
from fastvae.errors import FastvaeError
from fastvae.networks import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder, is_plain
from fastvae.nn import BernoulliLikelihood, Likelihood, likelihood_from_config
from fastvae.wake_sleep import wake_sleep

__all__ = ["VAE", "ConvDecoder", "ConvEncoder", "Loss", "MLPDecoder", "MLPEncoder"]

FUSED = {"objective": "elbo", "num_samples": 1, "kl_estimator": "analytic", "free_bits": 0.0}
"""Settings of the loss that `fastvae._mlp_loss` makes."""


def _check_latent_dim(latent_dim: int) -> None:
    if latent_dim < 1:
        raise FastvaeError(f"latent_dim is {latent_dim}, expected at least 1")


class Loss(NamedTuple):
    """What `VAE.forward` returns; `loss` alone is differentiable."""

    loss: Tensor
    """Scalar, a mean over the batch: nll + beta * kl (or the free-bits form of the KL), or minus the IWAE bound."""
    nll: Tensor
    """-log p(x|z) `[B]`, nats, averaged over the samples of each example."""
    kl: Tensor
    """KL[q(z|x) || p(z)] `[B]`, nats, unweighted: in closed form, or for IWAE and a Monte Carlo KL from the samples.

    So nll + kl is minus the ELBO whatever the objective, of which minus the IWAE bound is at most."""


class VAE(nn.Module):
    """A variational autoencoder.

    Args:
        encoder: data `[B, D]` -> `[B, 2 L]`, mu then logvar.
        decoder: latents `[..., L]` -> parameters of the likelihood.
        likelihood: p(x|z), see `fastvae.nn`.
        data_shape: shape of one example, for pictures; D is its product.
        latent_dim: L.

    >>> vae = VAE.mlp(data_shape=(28, 28), latent_dim=20, hidden=(400,))
    >>> vae(x).loss.backward()
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        *,
        data_shape: Sequence[int],
        latent_dim: int,
        architecture: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_latent_dim(latent_dim)
        self.encoder, self.decoder, self.likelihood = encoder, decoder, likelihood
        self.data_shape, self.latent_dim = tuple(data_shape), latent_dim
        self.architecture = architecture or {"name": "custom"}

    @classmethod
    def mlp(
        cls,
        *,
        data_shape: Sequence[int],
        latent_dim: int,
        hidden: Sequence[int] = (400,),
        activation: str = "relu",
        likelihood: Likelihood | None = None,
    ) -> VAE:
        """The paper's model: `hidden` widths for the encoder, reversed for the decoder."""
        _check_latent_dim(latent_dim)
        likelihood = likelihood or BernoulliLikelihood()
        data_dim = math.prod(data_shape)
        encoder = MLPEncoder(data_dim, hidden, latent_dim, activation)
        decoder = MLPDecoder(latent_dim, [*reversed(hidden)], likelihood.outputs_per_element * data_dim, activation)
        architecture = {"name": "mlp", "hidden": list(hidden), "activation": activation}
        return cls(
            encoder, decoder, likelihood, data_shape=data_shape, latent_dim=latent_dim, architecture=architecture
        )

    @classmethod
    def conv(
        cls,
        *,
        data_shape: Sequence[int],
        latent_dim: int,
        hidden: Sequence[int] = (32, 64),
        activation: str = "relu",
        likelihood: Likelihood | None = None,
    ) -> VAE:
        """Convolutions of `hidden` channels, each halving the image, for data `[H, W]` or `[C, H, W]`."""
        _check_latent_dim(latent_dim)
        likelihood = likelihood or BernoulliLikelihood()
        encoder = ConvEncoder(data_shape, hidden, latent_dim, activation)
        decoder = ConvDecoder(latent_dim, hidden, data_shape, likelihood.outputs_per_element, activation)
        architecture = {"name": "conv", "hidden": list(hidden), "activation": activation}
        return cls(
            encoder, decoder, likelihood, data_shape=data_shape, latent_dim=latent_dim, architecture=architecture
        )

    # the model

    def _flat(self, x: Tensor) -> Tensor:
        """Data `[B, D]` or `[B, *data_shape]`, float in [0, 1] or uint8, as floating point `[B, D]`."""
        if x.shape[1:].numel() != math.prod(self.data_shape) or x.ndim < 2:
            raise FastvaeError(f"data of shape {list(x.shape)} does not fit a model for [B, *{list(self.data_shape)}]")
        x = x.flatten(1)
        return x if x.is_floating_point() else x.float() / (255.0 if x.dtype == torch.uint8 else 1.0)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q(z|x): mu and logvar, `[B, L]` each."""
        mu, logvar = self.encoder(self._flat(x)).chunk(2, dim=-1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        """The parameters of p(x|z), as `likelihood` takes them, for z `[..., L]`."""
        params: Tensor = self.decoder(z)
        return params

    def forward(
        self,
        x: Tensor,
        *,
        seed: Tensor | None = None,
        objective: objectives.Objective = "elbo",
        num_samples: int = 1,
        gradient: objectives.Gradient = "plain",
        kl_estimator: objectives.Estimator = "analytic",
        beta: float | Tensor = 1.0,
        free_bits: float = 0.0,
        example_offset: int = 0,
        mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> Loss:
        """The training loss, by default SGVB estimator B with one sample: mean over the batch of nll + beta * kl.

        Args:
            x: data `[B, D]` or `[B, *data_shape]`, float in [0, 1] or uint8.
            seed: int64 `[1]`; default: drawn from torch's generator.
            objective: "elbo", "iwae" or "wake-sleep"; this and the next three are explained in `fastvae.objectives`.
            num_samples: samples of each posterior, L of the ELBO or K of IWAE.
            gradient: of IWAE: "plain", "stl" (sticking the landing) or "dreg" (doubly reparameterized).
            kl_estimator: of the ELBO: "analytic", or "monte-carlo" from the samples.
            beta: weight of the KL.
            free_bits: nats per latent dimension below which the batch-mean KL is not penalised (Kingma et al. 2016).
            example_offset: global index of the batch's first example.
            mean_over_ranks: where ranks share a batch, how they average: the free bits count by the whole batch's KL.

        Raises: FastvaeError for data that does not fit, or settings that have no meaning together.
        """
        objectives.check_objective(
            objective=objective,
            num_samples=num_samples,
            gradient=gradient,
            kl_estimator=kl_estimator,
            beta=beta,
            free_bits=free_bits,
        )
        x = self._flat(x)
        if objective == "wake-sleep":
            return Loss(*wake_sleep(self, x, seed=draw_seed(seed, None, x.device), example_offset=example_offset))
        if (objective, num_samples, kl_estimator, free_bits) == tuple(FUSED.values()):
            fused = self._fused_loss(x, seed, beta, example_offset)
            if fused is not None and fused[0] is not None:
                return Loss(fused[0], *fused[1:])
        mu, logvar = self.encode(x)
        noise = {"seed": seed, "example_offset": example_offset}
        if objective == "iwae":
            return Loss(
                *objectives.iwae_loss(
                    mu, logvar, lambda z: self.nll(z, x), num_samples=num_samples, gradient=gradient, **noise
                )
            )
        z, kl = objectives.elbo_samples(mu, logvar, num_samples=num_samples, kl_estimator=kl_estimator, **noise)
        kl_loss = objectives.penalty(kl, mu, logvar, free_bits=free_bits, mean_over_ranks=mean_over_ranks)
        nll_loss, nll = self.decoder_loss(z, x)
        return Loss(nll_loss + beta * kl_loss, nll.mean(0) if nll.ndim > 1 else nll, kl.detach())

    def write_gradients(
        self,
        x: Tensor,
        *,
        seed: Tensor | None = None,
        beta: float | Tensor = 1.0,
        example_offset: int = 0,
        at_hand: AtHand | None = None,
        **settings: Any,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """`forward` and a backward in one: the gradients of its loss become the `.grad` of the parameters.

        What was there is lost, not added to. Quicker for the paper's model, for which autograd has nothing to do: then
        None is in the place of the loss, which is the mean of nll + beta * kl. `at_hand` is for that case alone.
        """
        if is_plain(self, VAE) and all(settings.get(name, value) == value for name, value in FUSED.items()):
            fused = self._fused_loss(self._flat(x), seed, beta, example_offset, write_gradients=True, at_hand=at_hand)
            if fused is not None:
                return fused
        loss = self(x, seed=seed, beta=beta, example_offset=example_offset, **settings)
        self.zero_grad(set_to_none=True)
        # the caller's autocast is for the forward
        with torch.autocast(x.device.type, enabled=False):
            loss.loss.sum().backward()
        return loss.loss.detach(), loss.nll, loss.kl

    def writes_gradients(self, **settings: Any) -> bool:
        """Whether `write_gradients` does so without autograd, where there are kernels."""
        fits = is_plain(self, VAE) and all(settings.get(name, value) == value for name, value in FUSED.items())
        return fits and self._layers() is not None and not autograd_does_more(list(self.parameters()))

    def nll(self, z: Tensor, x: Tensor) -> Tensor:
        """-log p(x|z) `[..., B]` in nats, for z `[..., B, L]` and x `[B, D]`; an MLP decoder's output is not kept."""
        if isinstance(self.decoder, MLPDecoder) and self.decoder.has_plain_head():
            return self.likelihood.linear_nll(self.decoder.hidden(z), self.decoder.head, x)
        return self.likelihood.nll(self.decode(z), x)

    def decoder_loss(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the batch of -log p(x|z), made for training, and its terms `[B]`, which carry no gradient."""
        if isinstance(self.decoder, MLPDecoder) and self.decoder.has_plain_head():
            return self.likelihood.linear_loss(self.decoder.hidden(z), self.decoder.head, x)
        return self.likelihood.loss(self.decode(z), x)

    def _layers(self) -> tuple[Layers, Layers, str] | None:
        """Encoder, decoder and activation of the paper's model; None for every other model."""
        encoder, decoder = self.encoder, self.decoder
        if not (isinstance(encoder, MLPEncoder) and isinstance(decoder, MLPDecoder)):
            return None
        if type(self.likelihood) is not BernoulliLikelihood or encoder.activation != decoder.activation:
            return None
        encoder_layers, decoder_layers = encoder.layers(), decoder.layers()
        if encoder_layers is None or decoder_layers is None:
            return None
        return encoder_layers, decoder_layers, encoder.activation

    def _fused_loss(
        self, x: Tensor, seed: Tensor | None, beta: float | Tensor, example_offset: int, **how: Any
    ) -> tuple[Tensor | None, Tensor, Tensor] | None:
        """The loss as one Function, of the paper's model; None for every other model, or where it cannot be used."""
        found = self._layers()
        if found is None:
            return None
        encoder, decoder, activation = found
        return mlp_loss(
            x, encoder, decoder, activation=activation, seed=seed, beta=beta, example_offset=example_offset, **how
        )

    # using a trained model

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """E[x | z = mu(x)] `[B, *data_shape]`, in [0, 1]."""
        return self.likelihood.mean(self.decode(self.encode(x)[0])).unflatten(-1, self.data_shape)

    @torch.no_grad()
    def sample(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """E[x|z] for z ~ N(0, I), `[num_samples, *data_shape]`, in [0, 1]."""
        device = next(self.parameters()).device
        z = torch.randn(num_samples, self.latent_dim, device=device, generator=generator)
        return self.likelihood.mean(self.decode(z)).unflatten(-1, self.data_shape)

    # files: the methods are here, what they do is in `fastvae.pretrained`

    def config(self) -> dict[str, Any]:
        """What config.json holds."""
        return {
            "architecture": self.architecture,
            "data_shape": list(self.data_shape),
            "latent_dim": self.latent_dim,
            "likelihood": self.likelihood.config(),
        }

    def save_pretrained(self, path: str | Path) -> None:
        """Write `config.json` and `model.safetensors` (each atomically) into the folder `path`."""
        from fastvae import pretrained

        pretrained.save(self, Path(path))

    @classmethod
    def from_config(
        cls, config: dict[str, Any], *, encoder: nn.Module | None = None, decoder: nn.Module | None = None
    ) -> VAE:
        """An untrained model of the given `config()`; one of own modules needs `encoder` and `decoder`."""
        architecture = dict(config["architecture"])
        likelihood = likelihood_from_config(config["likelihood"])
        common = {"data_shape": tuple(config["data_shape"]), "latent_dim": config["latent_dim"]}
        if encoder is not None and decoder is not None:
            return cls(encoder, decoder, likelihood, architecture=architecture, **common)
        builders = {"mlp": cls.mlp, "conv": cls.conv}
        name = architecture.pop("name")
        if name not in builders:
            raise FastvaeError(f"a model of architecture {name!r} needs its own encoder= and decoder=")
        return builders[name](**common, likelihood=likelihood, **architecture)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, encoder: nn.Module | None = None, decoder: nn.Module | None = None, **hub: Any
    ) -> VAE:
        """Load a model from a folder, or from the Hugging Face Hub by its `owner/name`.

        Args:
            path: a folder with config.json and model.safetensors (a run directory is one), or a Hub repository.
            encoder: the encoder, for a model with modules of your own.
            decoder: the decoder, likewise.
            hub: `revision`, `token`, `cache_dir` and the like, for the Hub.

        Raises:
            FastvaeError: no model there, damaged, of a newer format, or of another architecture.
        """
        from fastvae import pretrained

        config, tensors, where = pretrained.load(path, **hub)
        vae = cls.from_config(config, encoder=encoder, decoder=decoder)
        pretrained.load_weights(vae, tensors, where=where)
        return vae
