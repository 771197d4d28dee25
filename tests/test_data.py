"""Data sets from every source, and one clear error for everything that is not one."""

import gzip
import hashlib
import http.server
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvae import downloads
from fastvae.data import load_dataset
from fastvae.errors import FastvaeError

IDX_CODES = {"uint8": 8, "int8": 9, "int16": 11, "int32": 12, "float32": 13, "float64": 14}


def idx_bytes(array):
    header = bytes([0, 0, IDX_CODES[array.dtype.name], array.ndim])
    shape = np.array(array.shape, ">u4").tobytes()
    return header + shape + array.astype(array.dtype.newbyteorder(">")).tobytes()


def images(count, seed=0, shape=(4, 3)):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def rows(array):
    return torch.from_numpy(array.reshape(len(array), -1).copy())


def write_folder(folder, train, test=None, form="{}-images-idx3-ubyte"):
    folder.mkdir(exist_ok=True)
    for split, array in (("train", train), ("t10k", test)):
        if array is not None:
            name = form.format(split)
            data = idx_bytes(array)
            (folder / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)


def refused(path, match, **kwargs):
    with pytest.raises(FastvaeError, match=match) as caught:
        load_dataset(str(path), **kwargs)
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)


def save(path, array):
    np.save(path, array, allow_pickle=True)
    return path


# what is accepted


def test_digits():
    dataset = load_dataset("digits")
    assert (dataset.train.shape, dataset.test.shape, dataset.shape) == ((1497, 64), (300, 64), (8, 8))
    assert dataset.train.dtype == dataset.test.dtype == torch.uint8
    # grey levels 0, 1, ..., 16 of the original
    assert torch.cat([dataset.train, dataset.test]).unique().tolist() == [round(v * 255 / 16) for v in range(17)]
    # the first image of the original, a zero, is test; its second row is 0 0 13 15 10 15 5 0
    assert dataset.test[0, 8:16].tolist() == [0, 0, 207, 239, 159, 239, 80, 0]
    assert torch.equal(dataset.train, load_dataset("digits").train)


@pytest.mark.parametrize("form", ["{}-images-idx3-ubyte", "{}-images.idx3-ubyte", "emnist-{}-images-idx3-ubyte.gz"])
def test_folder_of_idx_files(tmp_path, form):
    train, test = images(5), images(2, seed=1)
    write_folder(tmp_path, train, test, form)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(5, np.uint8)))
    (tmp_path / "README").write_text("not data")
    dataset = load_dataset(str(tmp_path))
    assert dataset.shape == (4, 3)
    assert torch.equal(dataset.train, rows(train))
    assert torch.equal(dataset.test, rows(test))
    assert dataset.train.is_contiguous()


def test_the_unpacked_file_is_taken_where_both_lie(tmp_path):
    write_folder(tmp_path, images(5, seed=1), images(2), "{}-images-idx3-ubyte.gz")
    write_folder(tmp_path, images(5), None)
    dataset = load_dataset(str(tmp_path))
    assert torch.equal(dataset.train, rows(images(5)))
    assert len(dataset.test) == 2


def test_gzip_is_known_by_its_content(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(gzip.compress(idx_bytes(images(20))))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(idx_bytes(images(3)))
    dataset = load_dataset(str(tmp_path))
    assert (len(dataset.train), len(dataset.test)) == (20, 3)


@pytest.mark.parametrize("place", ["", "fashion-mnist"])
def test_a_name_is_read_from_data_dir(tmp_path, place):
    write_folder(tmp_path / place, images(6), images(4))
    dataset = load_dataset("fashion-mnist", data_dir=tmp_path)
    assert (dataset.name, len(dataset.train), len(dataset.test)) == ("fashion-mnist", 6, 4)
    assert len(load_dataset(place or ".", data_dir=tmp_path).train) == 6


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (19, 1), (20, 2), (57, 5)])
def test_the_last_tenth_is_held_out(tmp_path, count, held_out):
    dataset = load_dataset(str(save(tmp_path / "x.npy", images(count))))
    assert torch.equal(dataset.train, rows(images(count)[:-held_out]))
    assert torch.equal(dataset.test, rows(images(count)[-held_out:]))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("bool", "uint8"), ("uint8", "uint8"), ("float16", "float32"), ("float32", "float32"), (">f8", "float32")],
)
def test_dtypes_of_arrays(tmp_path, dtype, expected):
    array = np.linspace(0, 1, 60).reshape(20, 3).round(1 if dtype[0] != "b" else 0).astype(dtype)
    scale = 255 if dtype == "bool" else 1
    dataset = load_dataset(str(save(tmp_path / "x.npy", array)))
    assert dataset.train.dtype == dataset.test.dtype == getattr(torch, expected)
    assert torch.equal(torch.cat([dataset.train, dataset.test]), rows(array.astype(expected) * scale))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_floating_point_idx_file(tmp_path, dtype):
    array = (images(20) / 255).astype(dtype)
    (tmp_path / "images.idx").write_bytes(idx_bytes(array))
    assert torch.equal(load_dataset(str(tmp_path / "images.idx")).train, rows(array[:18].astype("float32")))


@pytest.mark.parametrize("keys", [("train", "test"), ("x_train", "x_test")])
def test_npz(tmp_path, keys):
    train, test = images(5, shape=(3, 4, 4)), images(2, seed=1, shape=(3, 4, 4))
    np.savez_compressed(tmp_path / "x.npz", **dict(zip(keys, (train, test), strict=True)), y_train=np.zeros(5))
    dataset = load_dataset("x.npz", data_dir=tmp_path)
    assert dataset.shape == (3, 4, 4)
    assert torch.equal(dataset.train, rows(train))
    assert torch.equal(dataset.test, rows(test))
    np.savez(tmp_path / "one.npz", anything=images(20))
    assert len(load_dataset("one.npz", data_dir=tmp_path).test) == 2


def test_folder_of_npy_files(tmp_path):
    np.save(tmp_path / "train.npy", images(5))
    np.save(tmp_path / "test.npy", images(3, seed=1))
    dataset = load_dataset(str(tmp_path))
    assert torch.equal(dataset.train, rows(images(5)))
    assert torch.equal(dataset.test, rows(images(3, seed=1)))


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_rows_are_contiguous_whatever_the_order_of_the_file(tmp_path, shape):
    array = images(20, shape=shape)
    dataset = load_dataset(str(save(tmp_path / "x.npy", np.asfortranarray(array))))
    assert dataset.train.is_contiguous()
    assert torch.equal(dataset.train, rows(array[:18]))


def private_bytes():
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts memory as Linux tells it")
@pytest.mark.parametrize("kind", ["npy", "float32 npy", "idx"])
def test_a_file_is_mapped_not_read(tmp_path, kind):
    # 1 GB of zeros that takes no room on the disk
    path, count = tmp_path / f"big.{kind[-3:]}", 2**20
    if kind == "idx":
        path.write_bytes(bytes([0, 0, 8, 2]) + np.array([count, 1024], ">u4").tobytes())
        with path.open("ab") as file:
            file.truncate(12 + count * 1024)
    else:
        dtype = np.dtype("float32" if kind.startswith("f") else "uint8")
        np.lib.format.open_memmap(path, "w+", dtype, (count // dtype.itemsize, 1024))
    before = private_bytes()
    dataset = load_dataset(str(path))
    assert dataset.train[-1].sum() == 0
    assert private_bytes() - before < 100e6


# what is refused


def test_unknown_name(tmp_path):
    refused("FashionMNIST", "unknown data set 'FashionMNIST': expected one of digits, .*did you mean 'fashion-mnist'")
    refused("minst", "did you mean 'mnist'")
    with pytest.raises(FastvaeError) as caught:
        load_dataset(str(tmp_path / "none.npy"))
    assert "did you mean" not in str(caught.value)
    refused("mnist", "there is no folder .*missing: expected one with train-images-idx3", data_dir=tmp_path / "missing")
    refused("mnist", r"has 0 train files \(none\): expected one", data_dir=tmp_path)


def test_damaged_idx_files(tmp_path):
    path, whole = tmp_path / "train-images-idx3-ubyte", idx_bytes(images(5))
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(tmp_path, "begins with" if length < 16 else f"{length - 16} bytes of values: expected 60")
    path.write_bytes(whole + b"\0")
    refused(tmp_path, r"61 bytes of values: expected 60 for its header's shape \(5, 4, 3\)")
    for head in (b"\1\0\x08\3", b"\0\0\x0a\3", b"\x93NUM"):
        path.write_bytes(head + whole[4:])
        refused(tmp_path, f"begins with {head.hex(' ')}: expected the header of an IDX file")


def test_damaged_gzip(tmp_path):
    path, whole = tmp_path / "train-images-idx3-ubyte.gz", gzip.compress(idx_bytes(images(50)))
    for length in (2, 9, 10, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "cannot be read .*expected a whole IDX file")
    for position in (2, 60, len(whole) - 6):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        refused(path, "cannot be read .*expected a whole IDX file")


def test_two_train_files(tmp_path):
    write_folder(tmp_path, images(5), None)
    write_folder(tmp_path, images(5), None, "more-{}-images-idx3-ubyte")
    refused(tmp_path, r"has 2 train files \(more-train-images-idx3-ubyte, train-images-idx3-ubyte\)")


def test_labels_instead_of_images(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros(5, np.uint8)))
    refused(tmp_path, r"has shape \(5,\): expected \[N, ...\]")


@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (5, 0), (0, 4, 4)])
def test_arrays_without_examples(tmp_path, shape):
    refused(save(tmp_path / "x.npy", np.zeros(shape, np.uint8)), r"has shape \(.*\): expected \[N, ...\]")


def test_one_example_cannot_be_split(tmp_path):
    refused(save(tmp_path / "x.npy", images(1)), "has 1 example: expected 2 or more")


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint16", "complex64", "<U3", "datetime64[s]"])
def test_other_dtypes(tmp_path, dtype):
    refused(save(tmp_path / "x.npy", np.zeros((20, 3)).astype(dtype)), f"has type {dtype}".replace("[", r"\["))


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (np.nan, "has NaN at 1 of 60 places"),
        (np.inf, "has values from 0 to inf"),
        (255.0, r"has values from 0 to 255: expected \[0, 1\]"),
        (1.001, "has values from 0 to 1.001"),
        (-0.25, "has values from -0.25 to 0"),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_values_outside_the_unit_interval(tmp_path, value, match, dtype):
    array = np.zeros((20, 3), dtype)
    array[19, 1] = value
    refused(save(tmp_path / "x.npy", array), match if value != 1.001 else "has values from 0 to 1.00")


def test_channels_last(tmp_path):
    refused(save(tmp_path / "x.npy", images(9, shape=(8, 8, 3))), r"shape \(8, 8, 3\): expected channels first")


def test_test_set_of_another_shape_or_dtype(tmp_path):
    np.savez(tmp_path / "shape.npz", train=images(5), test=images(5, shape=(3, 4)))
    refused(tmp_path / "shape.npz", r"npz\[test\] has examples of shape \(3, 4\), uint8: expected \(4, 3\), uint8")
    np.savez(tmp_path / "dtype.npz", train=images(5), test=np.zeros((5, 4, 3), np.float32))
    refused(tmp_path / "dtype.npz", r"\(4, 3\), float32: expected \(4, 3\), uint8, as in .*npz\[train\]")


def test_damaged_or_foreign_numpy_files(tmp_path):
    path = save(tmp_path / "x.npy", images(20))
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refused(path, "cannot be read .*expected a whole .np[yz] file")
    np.savez(tmp_path / "x.npz", train=images(20), test=images(5))
    whole = (tmp_path / "x.npz").read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "x.npz").write_bytes(whole[:length])
        refused(tmp_path / "x.npz", "cannot be read .*expected a whole .np[yz] file")
    damaged = bytearray(whole)
    damaged[300] ^= 1
    (tmp_path / "x.npz").write_bytes(damaged)
    refused(tmp_path / "x.npz", "cannot be read .*CRC.*expected a whole .np[yz] file")
    np.savez(tmp_path / "keys.npz", a=images(2), b=images(2))
    refused(tmp_path / "keys.npz", "has the arrays a, b: expected train and test")


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_pickled_objects_are_never_loaded(tmp_path, suffix):
    array = np.array([[None, "a"]] * 20, dtype=object)
    path = tmp_path / f"x.{suffix}"
    np.save(path, array, allow_pickle=True) if suffix == "npy" else np.savez(path, array)
    refused(path, "cannot be read .*[Oo]bject.*expected a whole .np[yz] file without pickled objects")


# downloads, from servers on this machine


@pytest.fixture
def mirrors(tmp_path, monkeypatch):
    """Three mirrors of a little data set: one without the files, one with wrong ones, one with the right ones."""
    files = {"train-images-idx3-ubyte.gz": images(6), "t10k-images-idx3-ubyte.gz": images(4, seed=1)}
    served, requests = {}, []
    for name, array in files.items():
        served[f"/good/{name}"] = gzip.compress(idx_bytes(array), mtime=0)
        served[f"/wrong/{name}"] = served[f"/good/{name}"][:-1]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            data = served.get(self.path)
            self.send_response(404 if data is None else 200)
            self.end_headers()
            self.wfile.write(data or b"not here")

        def log_message(self, *_args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)

    def use(*names):
        sha256 = {name: hashlib.sha256(served[f"/good/{name}"]).hexdigest() for name in files}
        addresses = tuple(f"http://127.0.0.1:{server.server_port}/{name}/" for name in names)
        monkeypatch.setitem(downloads.DOWNLOADS, "mnist", downloads.Download(addresses, sha256))
        return tmp_path / "cache" / "fastvae" / "mnist", requests

    yield use
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_falls_back_to_the_next_mirror_and_is_kept(mirrors):
    folder, requests = mirrors("missing", "wrong", "good")
    dataset = load_dataset("mnist")
    assert torch.equal(dataset.train, rows(images(6)))
    assert torch.equal(dataset.test, rows(images(4, seed=1)))
    assert [path.split("/")[1] for path in requests] == ["missing", "wrong", "good"] * 2
    assert sorted(path.name for path in folder.iterdir()) == ["t10k-images-idx3-ubyte.gz", "train-images-idx3-ubyte.gz"]
    load_dataset("mnist")
    assert len(requests) == 6


def test_a_damaged_file_in_the_cache_is_fetched_again(mirrors):
    folder, requests = mirrors("good")
    load_dataset("mnist")
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"half")
    assert torch.equal(load_dataset("mnist").train, rows(images(6)))
    assert len(requests) == 3


def test_download_that_fails_everywhere(mirrors, monkeypatch):
    folder, _ = mirrors("missing", "wrong")
    refused("mnist", r"127\.0\.0\.1:\d+: 404 .*: SHA256 hash .*expected sha256:\w+ but got \w+\); .*--data-dir")
    assert list(folder.iterdir()) == []
    unreachable = downloads.Download(("http://127.0.0.1:1/",), downloads.DOWNLOADS["mnist"].sha256)
    monkeypatch.setitem(downloads.DOWNLOADS, "mnist", unreachable)
    refused("mnist", r"127\.0\.0\.1:1: ConnectionError\); expected a connection, or --data-dir with the files train-")


def test_published_checksums_are_well_formed():
    for source in downloads.DOWNLOADS.values():
        assert list(source.sha256) == ["train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"]
        assert all(len(bytes.fromhex(checksum)) == 32 for checksum in source.sha256.values())
        assert all(mirror.startswith("http") and mirror.endswith("/") for mirror in source.mirrors)
