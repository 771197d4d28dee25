"""One training step as a function of device state, with nothing random and no synchronisation on the host.

State: parameters, optimiser state, step counter, seed, schedules and data, all on the device. A step gathers its batch
(order, scaling, binarisation), runs the model, and updates the parameters; its metrics go to a ring on the device.
Every random number is a function of (seed, step, example), so a run continues from (parameters, optimiser state, step).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastvae import functional as F
from fastvae import reference
from fastvae._mlp_loss import AtHand
from fastvae.config import TrainConfig
from fastvae.distributed import ALONE, Ranks, Replica
from fastvae.flat_adam import FlatAdam, can_be_flat
from fastvae.models import VAE, Loss
from fastvae.optim import Adam
from fastvae.stream import BatchStream

__all__ = ["IWAE_STAGE_ENDS", "TrainingStep", "make_optimizer", "stream_seed"]

IWAE_STAGE_ENDS = (3 ** torch.arange(8)).cumsum(0)
"""Epochs after which the stages of the "iwae" schedule end: 1, 4, 13, 40, 121, 364, 1093, 3280."""


def stream_seed(seed: int) -> int:
    """SplitMix64 of a run's seed: the int64 key of its step 0. Step t has key + t, and keys of two runs never meet."""
    mask = (1 << 64) - 1
    x = (seed + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    x ^= x >> 31
    return x - (1 << 64) if x >= 1 << 63 else x


def make_optimizer(config: TrainConfig, parameters: list[nn.Parameter], num_train: int) -> torch.optim.Optimizer:
    """The optimiser, its learning rate a device scalar, the Gaussian prior on the parameters its weight decay."""
    device = parameters[0].device
    # the objective is a mean over examples: the prior's gradient, theta times its precision, is spread over all of them
    weight_decay = config.weight_decay / num_train
    if config.optimizer == "adagrad":
        # fused exists for the CPU alone; its lr may lie there whatever the device
        return torch.optim.Adagrad(
            parameters, lr=torch.tensor(config.lr), weight_decay=weight_decay, fused=device.type == "cpu" or None
        )
    lr = torch.tensor(config.lr, device=device)
    adam = FlatAdam if can_be_flat(parameters) else Adam
    return adam(parameters, lr=lr, eps=config.adam_eps, weight_decay=weight_decay)


def _schedules(
    config: TrainConfig, num_steps: int, steps_per_epoch: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Learning rate and KL weight of every step, float32 `[num_steps]` each."""
    step = torch.arange(num_steps, dtype=torch.float64)
    progress = (step - config.lr_warmup_steps).clamp_min(0) / max(1, num_steps - config.lr_warmup_steps)
    shape = {
        "constant": torch.ones_like(step),
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + torch.cos(math.pi * progress)),
        # stage i begins after 1 + 3 + ... + 3^(i-1) epochs
        "iwae": 10.0 ** -(torch.bucketize(step.long() // steps_per_epoch, IWAE_STAGE_ENDS[:-1], right=True) / 7),
    }[config.lr_schedule]

    def warmup(steps: int) -> Tensor:
        return ((step + 1) / max(1, steps)).clamp_max(1.0)

    lr = config.lr * shape * warmup(config.lr_warmup_steps)
    beta = config.beta * warmup(config.beta_warmup_steps)
    return lr.float().to(device), beta.float().to(device)


class TrainingStep:
    """Calling it takes one step and returns 1; `prepare(number)` before does what the host has to do for step `number`.

    `data` is the whole training set `[N, D]` on the device, or a stream of its batches. Of each batch the step takes
    this rank's part, its noise indexed by the example's place in the whole batch.

    Attributes:
        step: steps taken, int64 `[1]` on the device.
        metrics: ring of the last `log_every` steps, float32 `[log_every, 3]` on the device: loss, nll, kl in nats.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: VAE,
        optimizer: torch.optim.Optimizer,
        data: Tensor | BatchStream,
        num_steps: int,
        ranks: Ranks = ALONE,
    ) -> None:
        device = data.device
        self.config, self.model, self.optimizer, self.data = config, model, optimizer, data
        self.first, end = ranks.part(config.batch_size)
        self.forward = torch.compile(model) if config.compile else model
        self.steps_per_epoch = len(data) // config.batch_size
        self.lr, self.beta = _schedules(config, num_steps, self.steps_per_epoch, device)
        self.key = stream_seed(config.seed)
        self.epoch = -1
        self.order = torch.empty(len(data), dtype=torch.int64, device=device) if isinstance(data, Tensor) else None
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        # of the present step, all made from its number
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.lr_now, self.weights = torch.zeros((), device=device), torch.zeros(3, device=device)
        self.index = torch.arange(end - self.first, device=device)
        if isinstance(optimizer, FlatAdam):
            optimizer.count_with(self.step)
            if config.precision == "bf16":
                self.low = torch.empty_like(optimizer.parameters, dtype=torch.bfloat16)
                self.low_parameters = optimizer.views(self.low)
        self.metrics = torch.zeros(config.log_every, 3, device=device)
        # a cache of cast weights would outlive the step that a graph replays
        self.autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=config.precision == "bf16", cache_enabled=False
        )
        self.replica: Replica | None = None
        if ranks.size > 1:
            assert isinstance(self.forward, nn.Module)
            self.replica = Replica(self.forward, ranks)
            example = torch.zeros(end - self.first, *model.data_shape, device=device)
            self.forward = self.replica.distributed(example, **self.objective())

    def prepare(self, number: int) -> None:
        """The host's part of step `number`: the order of a new epoch, or the next batch of a stream."""
        if isinstance(self.data, BatchStream):
            self.data.load(number)
        elif number // self.steps_per_epoch != self.epoch:
            self.start_epoch(number // self.steps_per_epoch)

    def ahead(self, number: int) -> int:
        """How many steps from `number` on need the host only once, for the first of them."""
        return 1 if isinstance(self.data, BatchStream) else self.steps_per_epoch - number % self.steps_per_epoch

    def start_epoch(self, epoch: int) -> None:
        """Make the order of an epoch's examples: a function of (seed, epoch)."""
        key = torch.tensor([self.key], device=self.data.device) + epoch
        assert self.order is not None
        self.order.copy_(reference.permutation(key, len(self.data)))
        self.epoch = epoch

    def without_autograd(self) -> bool:
        """Whether the model's own gradients are all that the step takes, see `VAE.writes_gradients`."""
        return self.forward is self.model and self.model.writes_gradients(**self.objective())

    def _begin(self, kernels: Any, cast: tuple[Tensor, Tensor] | None) -> None:
        """Seed, learning rate, KL weight and examples of this step; copies the first of `cast` into the second."""
        group = self.optimizer.param_groups[0]
        # Adagrad's may lie on the host
        lr = group["lr"] if group["lr"].device == self.step.device else self.lr_now
        out = self.seed, lr, self.weights, self.index
        kernels.begin_step(
            self.step, self.key, self.lr, self.beta, self.order, self.config.batch_size, self.first, out, cast
        )
        if lr is self.lr_now:
            group["lr"].copy_(lr)

    def objective(self) -> dict[str, Any]:
        """What the loss module is told about this step's loss, the KL weight a device scalar."""
        settings = self.config.objective_settings
        if self.config.objective == "elbo":
            settings |= {"beta": self.weights[:1], "free_bits": self.config.free_bits}
        return settings

    def write_gradients(self, x: Tensor, **settings: Any) -> tuple[Tensor | None, Tensor, Tensor]:
        """Forward and backward of the loss module, as DistributedDataParallel and torch.compile need it, or faster."""
        with self.autocast:
            if self.forward is self.model:
                return self.model.write_gradients(x, **settings)
            loss = Loss(*self.forward(x, **settings))
        self.optimizer.zero_grad(set_to_none=True)
        loss.loss.sum().backward()
        return loss.loss.detach(), loss.nll, loss.kl

    def __call__(self, most: int = 1) -> int:
        config = self.config
        kernels, _ = F.kernel_package(self.step.device.type)
        kernels = reference if kernels is None else kernels
        data = self.data if isinstance(self.data, Tensor) else self.data.batch
        settings = {"seed": self.seed, "example_offset": self.first, **self.objective()}
        cast, dtype = None, torch.float32
        if self.without_autograd():
            at_hand = AtHand(self.weights[1:])
            if isinstance(self.optimizer, FlatAdam):
                # they are written at the place at which it reads them
                self.optimizer.lend_gradients()
                # where pixels are not drawn, the likelihood reads them in their own type, and none is rounded
                rows = (data, self.index) if config.transform == "scale" else None
                if config.precision == "bf16":
                    cast, dtype = (self.optimizer.parameters, self.low), self.low.dtype
                at_hand = AtHand(self.weights[1:], rows, self.low_parameters if cast else None)
            settings["at_hand"] = at_hand
        self._begin(kernels, cast)
        x = F.gather_batch(
            data, self.index, transform=config.transform, seed=self.seed, example_offset=self.first, dtype=dtype
        )
        loss, nll, kl = self.write_gradients(x, **settings)
        if config.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad_norm)
        self.optimizer.step()
        if self.replica is None:
            kernels.end_step(self.step, loss, nll, kl, self.weights[:1], self.metrics)
        else:
            row = self.replica.take_metrics()
            self.metrics.index_copy_(0, self.step % config.log_every, row.unsqueeze(0))
            self.step += 1
        return 1


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Float32 matrix products through TF32 tensor cores for "tf32", in full float32 otherwise; restored afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
