"""Encoders and decoders: the MLPs of the paper, h = ReLU(W1 x + b1), and a convolutional pair for images.

    encoder: data [..., D] -> [..., 2 L], mu then logvar
    decoder: latents [..., L] -> the parameters of a likelihood, [..., outputs_per_element * D]

Kernels take the weights of an MLP, not its modules, so they stand in for a call only while that would do nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, pairwise

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastvae import functional as F
from fastvae.errors import FastvaeError

__all__ = ["ConvDecoder", "ConvEncoder", "MLPDecoder", "MLPEncoder", "is_plain"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


class Linear(nn.Linear):
    """`torch.nn.Linear`, by the fastest products there are (`fastvae.functional.linear`)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class _MLP(nn.Module):
    """Hidden layers `body`, each a linear layer and the activation, then the linear layer `head`."""

    def __init__(self, widths: Sequence[int], outputs: int, activation: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        self.activation = activation
        hidden = [(Linear(i, o), ACTIVATIONS[activation]()) for i, o in pairwise(widths)]
        self.body = nn.Sequential(*chain.from_iterable(hidden))
        self.head = Linear(widths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.hidden(x))
        return out

    def hidden(self, x: Tensor) -> Tensor:
        """`body(x)`, a layer and its activation at a time."""
        layers = self.layers()
        if layers is None:
            out: Tensor = self.body(x)
            return out
        for weight, bias in layers[:-1]:
            x = F.linear(x, weight, bias, self.activation)
        return x

    def layers(self) -> list[tuple[Tensor, Tensor]] | None:
        """Weight and bias of every linear layer, in order; None if a call does anything but compute with these.

        It does in a subclass, and where a part has been exchanged, added, hooked or parametrized.
        """
        parts = [*self.body, self.head]
        kinds = (Linear, ACTIVATIONS[self.activation])
        if not (
            is_plain(self, MLPEncoder, MLPDecoder)
            and is_plain(self.body, nn.Sequential)
            and len(parts) % 2 == 1
            and all(is_plain(part, kinds[place % 2]) for place, part in enumerate(parts))
        ):
            return None
        layers: list[tuple[Tensor, Tensor]] = [(p.weight, p.bias) for p in parts if isinstance(p, nn.Linear)]
        return layers if all(bias is not None for _, bias in layers) else None


class MLPEncoder(_MLP):
    """`[..., D]` -> `[..., 2 L]`; mu and logvar come from one matrix product."""

    def __init__(self, data_dim: int, hidden: Sequence[int], latent_dim: int, activation: str = "relu") -> None:
        super().__init__([data_dim, *hidden], 2 * latent_dim, activation)


class MLPDecoder(_MLP):
    """`[..., L]` -> `[..., outputs]`. The output layer `head` is fused with the likelihood."""

    def __init__(self, latent_dim: int, hidden: Sequence[int], outputs: int, activation: str = "relu") -> None:
        super().__init__([latent_dim, *hidden], outputs, activation)

    def has_plain_head(self) -> bool:
        """Whether a call is `hidden`, whatever that is, then `weight` and `bias` of `head`, and nothing else."""
        return is_plain(self, MLPDecoder) and is_plain(self.head, Linear, nn.Linear)


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a call of `module` runs the forward of one of `kinds`, no subclass, and no hook."""
    return type(module) in kinds and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
        # accelerate's hooks are a forward of the instance's own
        or "forward" in module.__dict__
    )


def _halved(size: int) -> int:
    return (size + 1) // 2


class ConvEncoder(nn.Module):
    """`[..., C H W]` -> `[..., 2 L]`: convolutions that halve the image, then one linear layer."""

    def __init__(
        self, image_shape: Sequence[int], channels: Sequence[int], latent_dim: int, activation: str = "relu"
    ) -> None:
        super().__init__()
        self.image_shape = _channels_first(image_shape)
        c, h, w = self.image_shape
        layers: list[nn.Module] = []
        for c_in, c_out in pairwise([c, *channels]):
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), ACTIVATIONS[activation]()]
            h, w = _halved(h), _halved(w)
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = Linear([c, *channels][-1] * h * w, 2 * latent_dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x.reshape(-1, *self.image_shape)))
        return out.unflatten(0, x.shape[:-1])


class ConvDecoder(nn.Module):
    """`[..., L]` -> `[..., outputs_per_element C H W]`: the mirror of `ConvEncoder`."""

    def __init__(
        self,
        latent_dim: int,
        channels: Sequence[int],
        image_shape: Sequence[int],
        outputs_per_element: int = 1,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        c, h, w = _channels_first(image_shape)
        sizes = [(h, w)]
        for _ in channels:
            sizes.append((_halved(sizes[-1][0]), _halved(sizes[-1][1])))
        wide = [*reversed(channels)]
        self.body = nn.Sequential(
            Linear(latent_dim, (wide[0] if wide else c) * math.prod(sizes[-1])), ACTIVATIONS[activation]()
        )
        self.small_shape = ((wide[0] if wide else c), *sizes[-1])
        layers: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(pairwise([*wide, c * outputs_per_element])):
            (h_in, w_in), (h_out, w_out) = sizes[-1 - i], sizes[-2 - i]
            # a stride of 2 gives 2 n - 1 pixels; the output padding makes up for even sizes
            padding = (h_out - (2 * h_in - 1), w_out - (2 * w_in - 1))
            layers += [nn.ConvTranspose2d(c_in, c_out, 3, stride=2, padding=1, output_padding=padding)]
            layers += [ACTIVATIONS[activation]()]
        self.deconvolutions = nn.Sequential(*layers[:-1])

    def forward(self, z: Tensor) -> Tensor:
        small = self.body(z.reshape(-1, z.shape[-1])).unflatten(-1, self.small_shape)
        return self.deconvolutions(small).flatten(1).unflatten(0, z.shape[:-1])


def _channels_first(image_shape: Sequence[int]) -> tuple[int, int, int]:
    shape = tuple(image_shape) if len(image_shape) == 3 else (1, *image_shape)
    if len(shape) != 3:
        raise FastvaeError(
            f"a convolutional model needs images [H, W] or [C, H, W], got examples of {list(image_shape)}"
        )
    return shape
