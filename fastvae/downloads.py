"""Data sets by name: where they are published, what their files must hash to, and the cache they are kept in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from fastvae.errors import FastvaeError, one_line

__all__ = ["DOWNLOADS", "Download", "download"]


@dataclass(frozen=True)
class Download:
    """The files of a data set, gzipped IDX, each to be had from any of the mirrors."""

    mirrors: tuple[str, ...]  # base addresses, tried in this order
    sha256: dict[str, str]  # by file name


_TRAIN, _TEST = "train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"

DOWNLOADS = {
    # LeCun, Cortes, Burges: The MNIST database of handwritten digits, 1998
    "mnist": Download(
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        sha256={
            _TRAIN: "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            _TEST: "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        },
    ),
    # Xiao, Rasul, Vollgraf: Fashion-MNIST, 2017 (https://arxiv.org/abs/1708.07747)
    "fashion-mnist": Download(
        mirrors=(
            "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ),
        sha256={
            _TRAIN: "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            _TEST: "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        },
    ),
    # Clanuwat et al.: Deep learning for classical Japanese literature, 2018 (https://arxiv.org/abs/1812.01718)
    "kmnist": Download(
        mirrors=(
            "https://codh.rois.ac.jp/kmnist/dataset/kmnist/",
            "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        ),
        sha256={
            _TRAIN: "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            _TEST: "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
        },
    ),
}


def download(name: str) -> Path:
    """The folder in the cache that holds the files of `name`, whole; what is not there yet is fetched.

    Raises: FastvaeError if no mirror gives a file with the right checksum.
    """
    import pooch  # type: ignore[import-untyped]
    import requests  # what pooch downloads with

    source, folder = DOWNLOADS[name], Path(pooch.os_cache("fastvae")) / name
    for file, sha256 in source.sha256.items():
        reasons = []
        for mirror in source.mirrors:
            try:
                # fetched under another name, and renamed only if the checksum is right
                pooch.retrieve(mirror + file, known_hash=f"sha256:{sha256}", fname=file, path=folder)
                break
            except (requests.ConnectionError, requests.Timeout) as error:
                reason = type(error).__name__
            except (OSError, ValueError) as error:
                reason = one_line(error).split(". ")[0]
            reasons.append(f"{urlsplit(mirror).netloc}: {reason}")
        else:
            raise FastvaeError(
                f"{name}: {file} could not be downloaded to {folder} ({'; '.join(reasons)}); "
                f"expected a connection, or --data-dir with the files {' and '.join(source.sha256)}"
            )
    return folder
