"""What is compiled and counted: every op of the kernel package, in the dtypes and shapes of real models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Case", "cases"]

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DATA = FLOATS | {"uint8": torch.uint8, "bool": torch.bool}

# predictions and data
PAIRS = [("fp32", "fp32"), ("fp32", "uint8"), ("bf16", "uint8"), ("fp16", "fp16")]
MORE_PAIRS = [("bf16", "bf16"), ("fp32", "bool")]

# an MLP on MNIST at a large batch; then image decoders, latent maps, and few long rows
LATENT_SHAPES = [(4096, 64), (65536, 128)]
DATA_SHAPES = [(4096, 784), (16384, 3072), (8, 196608)]
# rows, inputs and outputs of an output layer
LAYER_SHAPES = [(4096, 512, 784), (16384, 512, 3072)]
# with wide data, where registers are scarcest, and with bytes
LAYER_PAIRS = [("fp32", "uint8"), ("tf32", "fp32"), ("bf16", "uint8"), ("bf16", "fp32"), ("fp16", "fp16")]


class Case(NamedTuple):
    """`function(*arguments())` of the kernel package."""

    op: str
    dtype: str
    shape: tuple[int, ...]
    function: str
    arguments: Callable[[], tuple[Any, ...]]
    main: bool  # part of the gate; the others, more shapes and dtypes, are for the report
    precision: str = "highest"  # of float32 matrix products, as `torch.set_float32_matmul_precision` takes it
    in_place: tuple[int, ...] = ()  # arguments that are read and then overwritten

    @property
    def name(self) -> str:
        return f"{self.op} {self.dtype} {'x'.join(map(str, self.shape))}"


def _seed() -> Tensor:
    return torch.zeros(1, dtype=torch.int64)


def _row_gradient(*leading: int) -> Tensor:
    return torch.empty(leading)


def _words(B: int, L: int) -> Case:
    return Case("philox_words", "int64", (B, L), "philox_words", lambda: (_seed(), 0, B, L, 0, 0), True)


def _latent(dtype_name: str, B: int, L: int, main: bool) -> Iterator[Case]:
    dtype, K = FLOATS[dtype_name], 8

    def tile(*leading: int) -> Tensor:
        return torch.empty(*leading, B, L, dtype=dtype)

    def pair() -> tuple[Tensor, Tensor]:
        return tile(), tile()

    table: list[tuple[str, str, Callable[[], tuple[Any, ...]]]] = [
        ("reparameterize fwd", "reparameterize_fwd", lambda: (*pair(), _seed(), None, 0, 0, 0)),
        ("reparameterize bwd", "reparameterize_bwd", lambda: (*pair(), _seed(), None, 0, 0, 0)),
        (f"reparameterize K={K} fwd", "reparameterize_fwd", lambda: (*pair(), _seed(), K, 0, 0, 0)),
        (f"reparameterize K={K} bwd", "reparameterize_bwd", lambda: (tile(K), tile(), _seed(), K, 0, 0, 0)),
        ("kl_standard_normal fwd", "kl_standard_normal_fwd", pair),
        ("kl_standard_normal bwd", "kl_standard_normal_bwd", lambda: (_row_gradient(B), *pair())),
        ("kl_normal fwd", "kl_normal_fwd", lambda: (*pair(), *pair())),
        ("kl_normal bwd", "kl_normal_bwd", lambda: (_row_gradient(B), *pair(), *pair())),
        ("reparameterize_kl fwd", "reparameterize_kl_fwd", lambda: (*pair(), _seed(), 0, 0, False)),
        ("reparameterize_kl per_dim fwd", "reparameterize_kl_fwd", lambda: (*pair(), _seed(), 0, 0, True)),
        (
            "reparameterize_kl bwd",
            "reparameterize_kl_bwd",
            lambda: (tile(), _row_gradient(B), *pair(), _seed(), 0, 0),
        ),
        (
            f"reparameterize_log_ratio K={K} fwd",
            "reparameterize_log_ratio_fwd",
            lambda: (*pair(), _seed(), K, 0, 0),
        ),
        (
            f"reparameterize_log_ratio K={K} bwd",
            "reparameterize_log_ratio_bwd",
            lambda: (tile(K), _row_gradient(K, B), *pair(), _seed(), K, False, 0, 0),
        ),
        (
            f"reparameterize_log_ratio K={K} bwd, sticking the landing",
            "reparameterize_log_ratio_bwd",
            lambda: (tile(K), _row_gradient(K, B), *pair(), _seed(), K, True, 0, 0),
        ),
    ]
    for op, function, arguments in table:
        yield Case(op, dtype_name, (B, L), function, arguments, main)


def _likelihoods(dtype_name: str, data_name: str, B: int, D: int, main: bool) -> Iterator[Case]:
    dtype, data = FLOATS[dtype_name], DATA[data_name]
    both = dtype_name if dtype_name == data_name else f"{dtype_name}+{data_name}"

    def tile() -> Tensor:
        return torch.empty(B, D, dtype=dtype)

    def x() -> Tensor:
        return torch.empty(B, D, dtype=data)

    def weight() -> Tensor:
        # the mean over the batch
        return torch.empty(()).expand(B)

    table: list[tuple[str, str, Callable[[], tuple[Any, ...]]]] = [
        ("bernoulli_nll fwd", "bernoulli_nll_fwd", lambda: (tile(), x(), None, 0)),
        ("bernoulli_nll bwd", "bernoulli_nll_bwd", lambda: (_row_gradient(B), tile(), x(), None, 0)),
        ("bernoulli_nll one pass", "bernoulli_nll_with_grad", lambda: (tile(), x(), None, None, 0, False)),
        (
            "bernoulli_nll one pass, column sums",
            "bernoulli_nll_with_grad",
            lambda: (tile(), x(), weight(), None, 0, True),
        ),
        ("gaussian_nll fwd", "gaussian_nll_fwd", lambda: (tile(), tile(), x())),
        ("gaussian_nll bwd", "gaussian_nll_bwd", lambda: (_row_gradient(B), tile(), tile(), x())),
        ("gaussian_nll one pass", "gaussian_nll_with_grad", lambda: (tile(), tile(), x(), None, False)),
        (
            "gaussian_nll one pass, column sums",
            "gaussian_nll_with_grad",
            lambda: (tile(), tile(), x(), weight(), True),
        ),
        ("gaussian_nll fwd, floor", "gaussian_nll_fwd", lambda: (tile(), tile(), x(), -7.0)),
        (
            "gaussian_nll one pass, column sums, floor",
            "gaussian_nll_with_grad",
            lambda: (tile(), tile(), x(), None, True, -7.0),
        ),
        (
            "gaussian_nll one pass, logvar per feature",
            "gaussian_nll_with_grad",
            lambda: (tile(), torch.empty(D, dtype=dtype), x(), weight(), False),
        ),
        (
            "gaussian_nll one pass, one logvar",
            "gaussian_nll_with_grad",
            lambda: (tile(), torch.empty((), dtype=dtype), x(), weight(), False),
        ),
    ]
    if data_name == "uint8":
        table.append(
            (
                "bernoulli_nll one pass, binarised",
                "bernoulli_nll_with_grad",
                lambda: (tile(), x(), weight(), _seed(), 0, False),
            )
        )
    for op, function, arguments in table:
        yield Case(op, both, (B, D), function, arguments, main)


def _gather(transform: str, dtype: str, B: int, D: int, main: bool) -> Case:
    def arguments() -> tuple[Any, ...]:
        # as many examples as the batch takes, in another order: each is read once
        data, index = torch.empty(B, D, dtype=torch.uint8), torch.arange(B).flip(0)
        return data, index, transform, None if transform == "scale" else _seed(), 0, FLOATS[dtype]

    return Case(f"gather_batch {transform}", f"uint8 to {dtype}", (B, D), "gather_batch", arguments, main)


def _scale(dtype: str, B: int, D: int, main: bool) -> Case:
    # with a scale of 1 the kernel would touch nothing
    def arguments() -> tuple[Any, ...]:
        return torch.empty(B, D, dtype=FLOATS[dtype]), torch.tensor([0.5])

    return Case("scale_", dtype, (B, D), "scale_", arguments, main, in_place=(0,))


def _activation(dtype: str, B: int, D: int, main: bool) -> Case:
    def arguments() -> tuple[Any, ...]:
        dy, y = torch.empty(2, B, D, dtype=FLOATS[dtype]).unbind()
        return dy, y, "relu"

    return Case("activation_bwd_ relu", dtype, (B, D), "activation_bwd_", arguments, main, in_place=(0,))


def _layer(dtype_name: str, data_name: str, B: int, H: int, D: int, main: bool) -> Case:
    dtype = torch.float32 if dtype_name == "tf32" else FLOATS[dtype_name]

    def arguments() -> tuple[Any, ...]:
        layer = [torch.empty(*size, dtype=dtype) for size in ((B, H), (D, H), (D,))]
        return *layer, torch.empty(B, D, dtype=DATA[data_name])

    both = dtype_name if dtype_name == data_name else f"{dtype_name}+{data_name}"
    precision = "high" if dtype_name == "tf32" else "highest"
    return Case("linear_bernoulli_nll fwd", both, (B, H, D), "linear_bernoulli_nll_fwd", arguments, main, precision)


def _part(width: int) -> Tensor:
    """Where partial sums for the biases of 784-500-20 go: a part of `ColumnSums`."""
    return torch.empty(64, 1824)[:, 500 : 500 + width]


def _backward(dtype_name: str, B: int, main: bool) -> Iterator[Case]:
    """Of the paper's MLP: gradients whose column sums are left for a launch that adds up all of them."""
    dtype = FLOATS[dtype_name]

    def tile(columns: int) -> Tensor:
        return torch.empty(B, columns, dtype=dtype)

    def latents() -> tuple[Any, ...]:
        encoded, dout = tile(40), tile(40)
        return tile(20), torch.empty(()).expand(B), *encoded.chunk(2, 1), _seed(), 0, 0, dout.chunk(2, 1), _part(40)

    def narrow() -> tuple[Any, ...]:
        weight, dweight = torch.empty(40, 500, dtype=dtype), torch.empty(40, 500, dtype=dtype)
        return tile(40), tile(500), weight, "relu", dweight, _part(500)

    yield Case("reparameterize_kl bwd, column sums", dtype_name, (B, 20), "reparameterize_kl_bwd", latents, main)
    yield Case("hidden_bwd relu, narrow", dtype_name, (B, 500), "hidden_bwd", narrow, main)


def _step(what: str, B: int, num_parameters: int) -> Case:
    def begin() -> tuple[Any, ...]:
        cast = torch.empty(num_parameters), torch.empty(num_parameters, dtype=torch.bfloat16)
        out = _seed(), torch.empty(()), torch.empty(3), torch.empty(B, dtype=torch.int64)
        # as many examples as the batch takes: each is read once
        return _seed(), 0, torch.empty(1), torch.empty(1), torch.arange(B), B, 0, out, cast

    def end() -> tuple[Any, ...]:
        return _seed(), None, torch.empty(B), torch.empty(B), torch.empty(1), torch.empty(1, 3)

    def adam() -> tuple[Any, ...]:
        buffers = torch.empty(4, num_parameters).unbind()
        return *buffers, _seed(), torch.empty(()), (0.9, 0.999), 1e-8, 0.0

    function, arguments = {"begin": ("begin_step", begin), "end": ("end_step", end), "adam": ("adam_flat_", adam)}[what]
    size = (num_parameters,) if what == "adam" else (B, num_parameters) if what == "begin" else (B,)
    in_place = (0, 2, 3) if what == "adam" else ()
    return Case(function, "fp32", size, function, arguments, True, in_place=in_place)


def cases() -> list[Case]:
    """All cases; names are unique."""
    found = [_words(*LATENT_SHAPES[0])]
    for i, (B, L) in enumerate(LATENT_SHAPES):
        for dtype in FLOATS:
            found += _latent(dtype, B, L, i == 0)
    for i, (B, D) in enumerate(DATA_SHAPES):
        for prediction, data in PAIRS + MORE_PAIRS:
            found += _likelihoods(prediction, data, B, D, i == 0 and (prediction, data) in PAIRS)
        for dtype in ("fp32", "bf16"):
            found += [_gather(how, dtype, B, D, i == 0) for how in ("scale", "binarize", "dequantize")]
        found += [_scale(dtype, B, D, i == 0) for dtype in FLOATS]
        # no hidden layer is as wide as the long rows, where the compiler unrolls its loop in a way that is not followed
        if B > 8:
            found += [_activation(dtype, B, D, i == 0) for dtype in ("fp32", "bf16")]
    for i, shape in enumerate(LAYER_SHAPES):
        found += [_layer(prediction, data, *shape, i == 0) for prediction, data in LAYER_PAIRS]
    found += [case for dtype in ("fp32", "bf16") for case in _backward(dtype, 4096, True)]
    # the parameters of 784-500-20
    return [*found, *(_step(what, 4096, 815_824) for what in ("begin", "end", "adam"))]
