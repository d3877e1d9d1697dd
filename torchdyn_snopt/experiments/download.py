"""Fetching data sets with the ordinary libraries, into the form that `data` reads.

Files come from where torchvision, aeon and the UCI repository keep them, or from OpenML through
scikit-learn. A download that breaks off goes on where it stopped; what has a published checksum is
compared with it. Files that were fetched by other means are taken from ``downloads/NAME`` inside
the folder of data sets.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import numpy as np

from torchdyn_snopt.errors import InvalidInputError, SNOptError
from torchdyn_snopt.experiments.data import Array, data_folder
from torchdyn_snopt.experiments.storage import replacing, write_text

CHUNK = 1 << 20
TIMEOUT = 20.0  # seconds without an answer
PARTIAL = ".part"

Progress = Callable[[str, int, int | None], None]
"""Told the name of a file, how many of its bytes have arrived, and how many there are, if known."""

Converted = dict[str, Array]


class DownloadError(SNOptError):
    """A file could not be fetched, or is not what it should be."""


@dataclass(frozen=True)
class Source:
    """A file on a server.

    Attributes:
        url: Where it is.
        md5: Its published checksum, or None.
    """

    url: str
    md5: str | None = None

    @property
    def name(self) -> str:
        """The file's name."""
        return PurePosixPath(urllib.request.url2pathname(self.url)).name


@dataclass(frozen=True)
class Recipe:
    """How a data set is made.

    Attributes:
        name: Of the data set.
        sources: The files to fetch.
        convert: From the fetched files to the arrays of the ``.npz`` file.
        needs: The package that does it, for the message when it is not installed.
    """

    name: str
    sources: Callable[[], Sequence[Source]]
    convert: Callable[[Sequence[Path]], Converted]
    needs: str


def fetch(name: str, data_dir: Path | None = None, tell: Progress = lambda *_: None) -> Path:
    """Fetch a data set, unless it is there already.

    Args:
        name: Of the task whose data to fetch.
        data_dir: The folder of data sets; see `data.data_folder`.
        tell: Told about the progress.

    Returns:
        The ``.npz`` file.

    Raises:
        InvalidInputError: No data set of that name is fetched.
        DownloadError: No connection, a wrong checksum, or a missing package.
    """
    if name not in RECIPES:
        raise InvalidInputError(
            "there is nothing to fetch of that name",
            got=f"{name!r}",
            allowed=", ".join(RECIPES),
            do="choose one of these; the data of other tasks are computed or come with a package",
        )
    folder = data_folder(data_dir)
    target = folder / f"{name}.npz"
    if target.exists():
        return target
    recipe = RECIPES[name]
    downloads = folder / "downloads" / name
    downloads.mkdir(parents=True, exist_ok=True)
    try:
        sources = recipe.sources()
        files = [download(source, downloads, tell) for source in sources]
        arrays = recipe.convert(files)
    except ImportError as error:
        raise DownloadError(
            f"the data of {name} need a package that is not installed",
            got=str(error),
            allowed=f"an environment with {recipe.needs}",
            do="pip install 'torchdyn-snopt[experiments]'",
        ) from error
    with replacing(target) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **cast(Any, arrays))
    about = {
        "sources": [source.url for source in sources],
        "sha256": _digest(target, hashlib.sha256()),
    }
    write_text(folder / f"{name}.json", json.dumps(about, indent=2) + "\n")
    shutil.rmtree(downloads)
    return target


# --- one file -------------------------------------------------------------------------------------


def download(source: Source, folder: Path, tell: Progress) -> Path:
    """Fetch one file, going on where an earlier attempt stopped.

    Args:
        source: The file.
        folder: Where to put it; a file that is there already is taken.
        tell: Told about the progress.

    Returns:
        The file.

    Raises:
        DownloadError: No connection, or a checksum that differs.
    """
    target = folder / source.name
    partial = folder / (source.name + PARTIAL)
    if not target.exists():
        try:
            _receive(source, partial, tell)
        except (OSError, urllib.error.URLError) as error:
            raise DownloadError(
                "a file could not be fetched",
                got=f"{source.url}: {getattr(error, 'reason', error)}",
                allowed="a connection to that server",
                do="repeat the command, which goes on where this stopped; or bring the file to "
                f"{target} by other means and repeat it; or name a folder that has the data set "
                "with --data-dir",
            ) from error
        partial.replace(target)
    found = _digest(target, hashlib.md5(usedforsecurity=False))
    if source.md5 is not None and found != source.md5:
        target.unlink()
        raise DownloadError(
            "a fetched file is not the published one",
            got=f"{source.url} with MD5 {found}",
            allowed=f"MD5 {source.md5}",
            do="repeat the command; the file has been removed",
        )
    return target


def _receive(source: Source, partial: Path, tell: Progress) -> None:
    present = partial.stat().st_size if partial.exists() else 0
    headers = {"User-Agent": "torchdyn-snopt"}
    if present:
        headers["Range"] = f"bytes={present}-"
    request = urllib.request.Request(source.url, headers=headers)
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if present and error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # everything had arrived
        raise
    with answer:
        goes_on = getattr(answer, "status", None) == HTTPStatus.PARTIAL_CONTENT
        done = present if goes_on else 0
        length = answer.headers.get("Content-Length")
        total = None if length is None else done + int(length)
        with partial.open("ab" if goes_on else "wb") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                tell(source.name, done, total)
    if total is not None and done < total:
        raise ConnectionError(f"the connection ended after {done} of {total} bytes")


def _digest(path: Path, state: Any) -> str:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            state.update(chunk)
    return str(state.hexdigest())


# --- images: torchvision's sources ----------------------------------------------------------------


def _mnist_sources() -> list[Source]:
    from torchvision.datasets import MNIST

    return [Source(MNIST.mirrors[0] + name, md5) for name, md5 in MNIST.resources]


def _from_mnist(files: Sequence[Path]) -> Converted:
    """Four gzipped IDX files, told apart by their names."""
    parts = {"train": "train", "test": "t10k"}
    arrays = {}
    for part, prefix in parts.items():
        for key, kind in (("x", "images"), ("y", "labels")):
            (path,) = [file for file in files if file.name.startswith(f"{prefix}-{kind}")]
            arrays[f"{key}_{part}"] = _read_idx(path)
    return arrays


def _read_idx(path: Path) -> Array:
    from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

    with tempfile.NamedTemporaryFile() as plain, gzip.open(path) as packed:
        shutil.copyfileobj(cast(BinaryIO, packed), plain)
        plain.flush()
        return cast(Array, read_sn3_pascalvincent_tensor(plain.name).numpy())


def _cifar_sources() -> list[Source]:
    from torchvision.datasets import CIFAR10

    return [Source(CIFAR10.url, CIFAR10.tgz_md5)]


def _from_cifar(files: Sequence[Path]) -> Converted:
    """Batches pickled by Python 2, inside one archive whose checksum has been compared."""
    parts: dict[str, list[Mapping[str, Any]]] = {"train": [], "test": []}
    with tarfile.open(files[0]) as archive:
        for member in sorted(archive.getnames()):
            part = {"data_batch": "train", "test_batch": "test"}.get(
                PurePosixPath(member).name[:10]
            )
            content = archive.extractfile(member) if part else None
            if part and content is not None:
                parts[part].append(pickle.load(content, encoding="latin1"))
    arrays = {}
    for part, batches in parts.items():
        pixels = np.concatenate([batch["data"] for batch in batches])
        arrays[f"x_{part}"] = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = [label for batch in batches for label in batch["labels"]]
        arrays[f"y_{part}"] = np.array(labels, dtype=np.uint8)
    return arrays


def _svhn_sources() -> list[Source]:
    from torchvision.datasets import SVHN

    listed = [SVHN.split_list[part] for part in ("train", "test")]
    return [Source(url, md5) for url, _, md5 in listed]


def _from_svhn(files: Sequence[Path]) -> Converted:
    """MATLAB files with images last, and 10 for the digit 0."""
    from scipy.io import loadmat

    arrays = {}
    for part, path in zip(("train", "test"), files, strict=True):
        content = loadmat(path)
        arrays[f"x_{part}"] = content["X"].transpose(3, 0, 1, 2)
        arrays[f"y_{part}"] = (content["y"].ravel() % 10).astype(np.uint8)
    return arrays


# --- time series: aeon ----------------------------------------------------------------------------

UEA = "https://timeseriesclassification.com/aeon-toolkit/{}.zip"


def _series(name: str, problem: str) -> Recipe:
    def convert(files: Sequence[Path]) -> Converted:
        from aeon.datasets import load_from_ts_file

        loaded = {}
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(files[0]) as archive:
            for part in ("train", "test"):
                (member,) = [
                    each
                    for each in archive.namelist()
                    if PurePosixPath(each).name.lower() == f"{problem}_{part}.ts".lower()
                ]
                loaded[part] = load_from_ts_file(archive.extract(member, folder))
        return _from_series(loaded)

    return Recipe(name, lambda: [Source(UEA.format(problem))], convert, "aeon")


def _bundled_vowels(files: Sequence[Path]) -> Converted:
    from aeon.datasets import load_japanese_vowels

    return _from_series({part: load_japanese_vowels(split=part) for part in ("train", "test")})


def _from_series(loaded: Mapping[str, tuple[Any, Any]]) -> Converted:
    """Series ``[channels, length]`` of any lengths, with labels of any kind, as padded arrays."""
    classes = sorted(
        {str(label) for _, labels in loaded.values() for label in labels}, key=_natural
    )
    number = {label: i for i, label in enumerate(classes)}
    longest = max(each.shape[1] for series, _ in loaded.values() for each in series)
    arrays = {}
    for part, (series, labels) in loaded.items():
        lengths = np.array([each.shape[1] for each in series])
        x = np.full((len(series), longest, series[0].shape[0]), np.nan, dtype=np.float32)
        for i, each in enumerate(series):
            x[i, : each.shape[1]] = each.T
        arrays[f"x_{part}"] = x
        arrays[f"y_{part}"] = np.array([number[str(label)] for label in labels], dtype=np.int64)
        arrays[f"length_{part}"] = lengths.astype(np.int64)
    return arrays


def _natural(label: str) -> tuple[float, str]:
    """Numbers in their order, everything else by the alphabet."""
    try:
        return float(label), ""
    except ValueError:
        return 0.0, label


# --- points: UCI and OpenML -----------------------------------------------------------------------

UCI_GAS = (
    "https://archive.ics.uci.edu/static/public/322/gas+sensor+array+under+dynamic+gas+mixtures.zip"
)
GAS_MEMBER = "ethylene_CO.txt"
GAS_LEADING = 3  # columns for time and the two concentrations
GAS_SHARE = 0.1
CORRELATED = 0.98
MINIBOONE_ID = 41150  # on OpenML
OUTLIER = -100.0
MOST_REPEATED = 5


def _from_gas(files: Sequence[Path]) -> Converted:
    """Sensors that are no copies of others, standardized (Papamakarios et al. 2017); a tenth."""
    import pandas as pd

    with zipfile.ZipFile(files[0]) as archive:
        (member,) = [each for each in archive.namelist() if each.endswith(GAS_MEMBER)]
        with archive.open(member) as content:
            table = pd.read_csv(content, sep=r"\s+", skiprows=1, header=None, dtype=np.float64)
    x = without_copies(table.to_numpy()[:, GAS_LEADING:])
    x = (x - x.mean(axis=0)) / x.std(axis=0, ddof=1)
    train, test = _tail_split(x)
    generator = np.random.default_rng(0)
    return {
        f"x_{part}": rows[
            np.sort(generator.choice(len(rows), int(GAS_SHARE * len(rows)), replace=False))
        ].astype(np.float32)
        for part, rows in (("train", train), ("test", test))
    }


def without_copies(x: Array) -> Array:
    """Remove columns, the first one each time, until no two are correlated above 0.98.

    Args:
        x: ``[samples, columns]``.

    Returns:
        The columns that are left.
    """
    correlated = np.corrcoef(x, rowvar=False) > CORRELATED
    kept = list(range(x.shape[1]))
    while len(kept) > 1:
        counts = correlated[np.ix_(kept, kept)].sum(axis=1)
        if counts.max() <= 1:
            break
        del kept[int(np.argmax(counts > 1))]
    return x[:, kept]


def _from_miniboone(files: Sequence[Path]) -> Converted:
    """Papamakarios et al. 2017: signal events without outliers, and without repeating features."""
    from sklearn.datasets import fetch_openml

    try:
        x, y = fetch_openml(data_id=MINIBOONE_ID, return_X_y=True, as_frame=False)
    except (OSError, urllib.error.URLError) as error:
        raise DownloadError(
            "OpenML could not be reached",
            got=f"data set {MINIBOONE_ID}: {error}",
            allowed="a connection to www.openml.org",
            do="repeat the command when there is one, or name a folder that has miniboone.npz "
            "with --data-dir",
        ) from error
    return signal_events(np.asarray(x, dtype=np.float64), np.asarray(y))


def signal_events(x: Array, is_signal: Array) -> Converted:
    """The preparation of MiniBooNE by Papamakarios et al. 2017.

    Args:
        x: ``[events, features]``.
        is_signal: ``[events]``, the text of a truth value.

    Returns:
        ``x_train`` (their training and validation parts) and ``x_test``, standardized by the
        former.
    """
    signal = np.char.lower(is_signal.astype(str)) == "true"
    x = x[signal & (x[:, 0] >= OUTLIER)]
    varied = [np.unique(column, return_counts=True)[1].max() <= MOST_REPEATED for column in x.T]
    test_rows = int(0.1 * len(x))
    train, test = x[:-test_rows, varied], x[-test_rows:, varied]
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    return {
        "x_train": ((train - mean) / deviation).astype(np.float32),
        "x_test": ((test - mean) / deviation).astype(np.float32),
    }


def _tail_split(x: Array) -> tuple[Array, Array]:
    """The last tenth tests, the tenth before it validates and is left out."""
    test_rows = int(0.1 * len(x))
    rest = x[:-test_rows]
    return rest[: -int(0.1 * len(rest))], x[-test_rows:]


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("mnist", _mnist_sources, _from_mnist, "torchvision"),
        Recipe("svhn", _svhn_sources, _from_svhn, "torchvision and scipy"),
        Recipe("cifar10", _cifar_sources, _from_cifar, "torchvision"),
        _series("spoken-arabic-digits", "SpokenArabicDigits"),
        _series("articulary-word", "ArticularyWordRecognition"),
        _series("character-trajectories", "CharacterTrajectories"),
        Recipe("japanese-vowels", list, _bundled_vowels, "aeon"),
        Recipe("gas", lambda: [Source(UCI_GAS)], _from_gas, "pandas"),
        Recipe("miniboone", list, _from_miniboone, "scikit-learn"),
    )
}
