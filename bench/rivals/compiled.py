"""torch.compile of the hand-written loop: gather, forward, loss and backward compiled, then fused Adam.

Adam is left to its fused kernel, which is one call and faster on the CPU than its compiled form (see bench/README.md).
"""

from __future__ import annotations

import torch

from bench.rivals import Work, resident

REQUIRES = ("torch",)


class Provider(resident.Provider):
    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.loss = torch.compile(self.loss, dynamic=False)  # type: ignore[method-assign]
