"""Data on the host: the same order, the same noise and the same bits as on the device, in memory that does not grow."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvae import placement, reference, stream
from fastvae.array_files import mapped_file
from fastvae.capture import CapturedStep
from fastvae.config import TrainConfig
from fastvae.data import load_dataset
from fastvae.distributed import ALONE, Ranks
from fastvae.evaluate import evaluate
from fastvae.models import VAE
from fastvae.step import TrainingStep, make_optimizer
from fastvae.stream import BatchStream, EpochOrder, HostRows
from fastvae.train import resume, train
from tests.runs import assert_same, final

SMALL = TrainConfig(data="digits", hidden=(16,), latent_dim=3, epochs=2, batch_size=100, log_every=4)
STATUS = Path("/proc/self/status")


@pytest.mark.parametrize("bucket", [2**20, 300, 7])
def test_an_order_made_in_parts_is_the_permutation(bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BUCKET", bucket)
    monkeypatch.setattr(stream, "CHUNK", 256)
    seed = torch.tensor([2**40 + 5])
    for N in (1, 2, 999, 2048):
        whole, order = reference.permutation(seed, N).numpy(), EpochOrder(seed, N)
        for first, last in ((0, N), (N // 3, N // 2), (0, 1), (N - 1, N), (N // 5, N)):
            if first < last:
                np.testing.assert_array_equal(order(first, last), whole[first:last])


@pytest.mark.parametrize("variant", [{}, {"likelihood": "gaussian", "dequantize": True}], ids=str)
def test_streamed_is_resident_bit_for_bit(variant: dict[str, object], tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, **variant)
    device = train(dataclasses.replace(config, out=tmp_path / "device"))
    host = train(dataclasses.replace(config, out=tmp_path / "host", data_on="host", max_steps=17))
    # on in the middle of an epoch, and back on the device
    resume(host, max_steps=23)
    resume(host, max_steps=None, data_on="device")
    assert_same(final(device) | {"rows": []}, final(host) | {"rows": []})


def test_a_mapped_file_of_floats_is_streamed(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((330, 5, 4), dtype=np.float32)
    np.save(tmp_path / "x.npy", images)
    dataset = load_dataset(str(tmp_path / "x.npy"))
    assert dataset.train_file is not None
    config = dataclasses.replace(SMALL, data=str(tmp_path / "x.npy"), likelihood="gaussian", batch_size=32)
    device = train(dataclasses.replace(config, out=tmp_path / "device"))
    assert_same(final(device), final(train(dataclasses.replace(config, out=tmp_path / "host", data_on="host"))))


def test_auto_goes_by_size(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cpu, total = torch.device("cpu"), 2 * 10**9
    monkeypatch.setattr(placement.os, "sysconf", lambda name: total if "PAGES" in name else 1)
    assert placement.fits_on(cpu, total // 2)
    assert not placement.fits_on(cpu, total // 2 + 1)
    monkeypatch.setattr(placement, "fits_on", lambda device, num_bytes: num_bytes != 1797 * 64)
    train(dataclasses.replace(SMALL, out=tmp_path / "run", max_steps=2))
    assert "the data (0.000115 GB) stays on the host" in capsys.readouterr().out


def test_ranks_take_their_parts_of_each_batch() -> None:
    rows = HostRows(torch.arange(50, dtype=torch.uint8).unsqueeze(1), None)

    def batches(ranks: Ranks) -> list[torch.Tensor]:
        options = {"key": 9, "batch_size": 10, "num_steps": 10, "device": torch.device("cpu")}
        with BatchStream(rows, ranks=ranks, **options) as batches:
            taken = []
            for number in range(10):
                batches.load(number)
                taken.append(batches.batch.clone())
        return taken

    parts = zip(batches(ALONE), batches(Ranks(0, 2)), batches(Ranks(1, 2)))
    assert all(torch.equal(whole, torch.cat([first, second])) for whole, first, second in parts)


def test_what_the_thread_runs_into_is_raised_by_the_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(HostRows, "take", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        train(dataclasses.replace(SMALL, out=tmp_path / "run", data_on="host"))


def test_evaluation_of_rows_on_the_host_is_that_of_a_tensor() -> None:
    torch.manual_seed(0)
    vae, data = VAE.mlp(data_shape=(12,), latent_dim=2, hidden=(8,)), torch.randint(0, 256, (250, 12)).byte()
    both = [evaluate(vae, x, transform="binarize", seed=1, batch_size=60) for x in (data, HostRows(data, None))]
    assert both[0] == both[1]


# memory


def file_mb() -> float:
    """Resident memory of this process that is pages of files, in MB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) / 1024


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """400 MB of zeros that take no space on the disk."""
    path = tmp_path / "zeros.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(400_000, 1000))
    return path


@pytest.mark.skipif(not STATUS.is_file(), reason="reads /proc")
def test_memory_does_not_grow_with_the_file(sparse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAPPED_BYTES", 20 * 2**20)
    array = np.lib.format.open_memmap(sparse, mode="c")
    rows = HostRows(torch.from_numpy(np.asarray(array)), mapped_file(array), random_access=True)
    before, most = file_mb(), 0.0
    index, out = np.random.default_rng(0).integers(0, len(rows), (400, 100)), np.empty((100, 1000), np.uint8)
    for part in index:
        rows.take(part, out)
        most = max(most, file_mb())
    for start in range(0, len(rows), 1000):
        assert not rows[start : start + 1000].any()
        most = max(most, file_mb())
    assert most - before < 40
    # and without it: what the bound is there for
    assert not array.any()
    assert file_mb() - before > 300


@pytest.mark.skipif(not STATUS.is_file(), reason="reads /proc")
def test_floats_are_looked_through_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, most = tmp_path / "zeros.npy", 0.0
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(100_000, 1000))
    before, looked = file_mb(), np.ndarray.min

    class Watched(np.memmap):
        def min(self, *args: object, **kwargs: object) -> object:
            nonlocal most
            result = looked(self, *args, **kwargs)
            most = max(most, file_mb())
            return result

    monkeypatch.setattr(np, "memmap", Watched)
    assert len(load_dataset(str(path)).train) == 90_000
    assert 0 < most - before < 100


# CUDA


@pytest.mark.cuda
@pytest.mark.parametrize("replayed", [False, True])
def test_copies_on_a_second_stream_are_the_resident_data_bit_for_bit(replayed: bool) -> None:
    data = torch.randint(0, 256, (3200, 784), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(hidden=(64,), latent_dim=5, batch_size=320)
    device = torch.device("cuda", torch.cuda.current_device())

    def run(held: torch.Tensor | BatchStream) -> TrainingStep:
        torch.manual_seed(0)
        model = VAE.mlp(data_shape=(784,), latent_dim=5, hidden=(64,)).to(device)
        step = TrainingStep(config, model, make_optimizer(config, list(model.parameters()), 3200), held, 100)
        take = CapturedStep(step, print) if replayed else step
        for number in range(100):
            step.prepare(number)
            # the host is far ahead of the device, as it is in training
            torch.cuda._sleep(200_000)
            take()
        torch.cuda.synchronize()
        return step

    resident = run(data.to(device))
    options = {"key": resident.key, "batch_size": 320, "num_steps": 100, "device": device, "ranks": ALONE}
    with BatchStream(HostRows(data, None), **options) as batches:
        streamed = run(batches)
    assert torch.equal(resident.metrics, streamed.metrics)
    for a, b in zip(resident.model.parameters(), streamed.model.parameters()):
        assert torch.equal(a, b)
