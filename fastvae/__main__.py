"""The program: `fastvae`, `python -m fastvae`, `torchrun -m fastvae`."""

from __future__ import annotations

from fastvae.process import prepare_process


def main() -> None:
    """Entry point."""
    prepare_process()
    # now that it may import torch
    from fastvae.cli import main

    main()


if __name__ == "__main__":
    main()
