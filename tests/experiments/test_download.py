"""Fetching data: from a server of our own, files made up in the published forms."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import struct
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.experiments import download as downloads
from torchdyn_snopt.experiments.data import load_arrays
from torchdyn_snopt.experiments.download import RECIPES, DownloadError, Recipe, Source, fetch


@pytest.fixture
def server():
    """Serves `files`, honours ranges, notes what was asked for, and can break off."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content = state.files.get(self.path)
            if content is None:
                self.send_error(404)
                return
            asked = self.headers.get("Range")
            state.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
            if asked and start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            end = len(content) if state.breaks_at is None else state.breaks_at
            state.breaks_at = None
            self.wfile.write(content[start:end])

        def log_message(self, *_):
            pass

    state = SimpleNamespace(files={}, ranges=[], breaks_at=None, url="")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        state.url = f"http://127.0.0.1:{httpd.server_address[1]}"
        yield state
        httpd.shutdown()


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


# --- one file -------------------------------------------------------------------------------------


def test_a_download_that_breaks_off_goes_on_where_it_stopped(server, tmp_path):
    content = bytes(range(256)) * 40
    server.files["/some.bin"] = content
    server.breaks_at = 4000
    source = Source(f"{server.url}/some.bin", md5(content))
    with pytest.raises(DownloadError, match="goes on where this stopped"):
        downloads.download(source, tmp_path, lambda *_: None)
    assert (tmp_path / "some.bin.part").stat().st_size == 4000
    told = []
    path = downloads.download(source, tmp_path, lambda *news: told.append(news))
    assert server.ranges == [None, "bytes=4000-"]
    assert path.read_bytes() == content
    assert told[-1] == ("some.bin", len(content), len(content))
    downloads.download(source, tmp_path, lambda *_: None)
    assert len(server.ranges) == 2  # what is there is not asked for again


def test_a_whole_part_is_taken_as_it_is(server, tmp_path):
    server.files["/some.bin"] = b"everything"
    (tmp_path / "some.bin.part").write_bytes(b"everything")
    path = downloads.download(Source(f"{server.url}/some.bin"), tmp_path, lambda *_: None)
    assert path.read_bytes() == b"everything"


def test_a_wrong_checksum_removes_the_file(server, tmp_path):
    server.files["/some.bin"] = b"something else"
    source = Source(f"{server.url}/some.bin", md5(b"the published file"))
    with pytest.raises(DownloadError, match="not the published one"):
        downloads.download(source, tmp_path, lambda *_: None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["http://127.0.0.1:9/mnist.gz", "{url}/missing.gz"])
def test_without_a_connection_the_message_says_how_to_get_the_file(server, tmp_path, place):
    source = Source(place.format(url=server.url))
    with pytest.raises(DownloadError) as caught:
        downloads.download(source, tmp_path, lambda *_: None)
    assert source.url in str(caught.value)
    assert str(tmp_path / source.name) in str(caught.value)
    assert "--data-dir" in str(caught.value)


# --- a data set -----------------------------------------------------------------------------------


def test_a_data_set_is_fetched_once_with_its_provenance(server, tmp_path, monkeypatch):
    server.files["/points.bin"] = np.arange(12, dtype=np.float32).tobytes()

    def convert(files):
        x = np.frombuffer(files[0].read_bytes(), np.float32).reshape(3, 4)
        return {"x_train": x, "x_test": x[:1]}

    source = Source(f"{server.url}/points.bin")
    monkeypatch.setitem(RECIPES, "points", Recipe("points", lambda: [source], convert, "numpy"))
    folder = tmp_path / "new" / "folder"
    path = fetch("points", folder)
    assert path == folder / "points.npz"
    assert load_arrays("points", "points", folder).x_train.shape == (3, 4)
    about = json.loads((folder / "points.json").read_text())
    assert about["sources"] == [source.url]
    assert about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not (folder / "downloads" / "points").exists()
    server.files.clear()
    assert fetch("points", folder) == path


def test_a_file_brought_by_other_means_is_taken(tmp_path, monkeypatch):
    place = tmp_path / "downloads" / "points"
    place.mkdir(parents=True)
    (place / "points.bin").write_bytes(b"\0" * 16)
    made = {"x_train": np.zeros((1, 1), np.float32), "x_test": np.zeros((1, 1), np.float32)}
    source = Source("http://127.0.0.1:9/points.bin")
    monkeypatch.setitem(
        RECIPES, "points", Recipe("points", lambda: [source], lambda files: made, "numpy")
    )
    assert fetch("points", tmp_path).exists()


def test_a_missing_package_and_an_unknown_name_are_answered(tmp_path, monkeypatch):
    def convert(files):
        raise ImportError("No module named 'aeon'")

    monkeypatch.setitem(RECIPES, "some", Recipe("some", list, convert, "aeon"))
    with pytest.raises(DownloadError, match=r"(?s)aeon.*torchdyn-snopt\[experiments\]"):
        fetch("some", tmp_path)
    with pytest.raises(InvalidInputError, match=r"(?s)'moons'.*mnist, svhn"):
        fetch("moons", tmp_path)


def test_every_recipe_but_the_bundled_ones_names_where_its_files_are():
    pytest.importorskip("torchvision")
    for name, recipe in RECIPES.items():
        sources = recipe.sources()
        assert all(source.url.startswith("http") for source in sources)
        assert bool(sources) == (name not in {"japanese-vowels", "miniboone"})


# --- the published forms --------------------------------------------------------------------------


def idx(array):
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(head + array.tobytes())


def test_mnist_is_read_from_its_idx_files(tmp_path):
    pytest.importorskip("torchvision")
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    labels = np.array([3, 1, 4], dtype=np.uint8)
    for part, count in (("train", 3), ("t10k", 2)):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images[:count]))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(labels[:count]))
    arrays = RECIPES["mnist"].convert(sorted(tmp_path.iterdir()))
    assert np.array_equal(arrays["x_train"], images)
    assert arrays["y_test"].tolist() == [3, 1]


def test_cifar_is_read_from_its_batches(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 3072), dtype=np.uint8)
    batches = {"data_batch_1": slice(0, 2), "data_batch_2": slice(2, 4), "test_batch": slice(4, 6)}
    path = tmp_path / "cifar.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, rows in batches.items():
            content = pickle.dumps({"data": pixels[rows], "labels": list(range(6))[rows]})
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    arrays = RECIPES["cifar10"].convert([path])
    assert arrays["x_train"].shape == (4, 32, 32, 3)
    assert np.array_equal(arrays["x_train"][3, :, :, 1].ravel(), pixels[3, 1024:2048])
    assert arrays["y_test"].tolist() == [4, 5]


def test_svhn_is_read_from_matlabs_files(tmp_path):
    from scipy.io import savemat

    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 2), dtype=np.uint8)
    paths = [tmp_path / "train.mat", tmp_path / "test.mat"]
    for path in paths:
        savemat(path, {"X": images, "y": np.array([[10], [7]], dtype=np.uint8)})
    arrays = RECIPES["svhn"].convert(paths)
    assert np.array_equal(arrays["x_train"][1], images[..., 1])
    assert arrays["y_test"].tolist() == [0, 7]


def test_series_of_the_archive_are_padded_and_their_labels_counted_from_0(tmp_path):
    pytest.importorskip("aeon")
    head = (
        "@problemName ArticularyWordRecognition\n@timeStamps false\n@missing false\n"
        "@univariate false\n@dimensions 2\n@equalLength false\n"
        "@classLabel true 1.0 10.0 2.0\n@data\n"
    )
    parts = {
        "TRAIN": "1,2,3:4,5,6:10.0\n7,8:9,10:2.0\n",
        "TEST": "1,2,3,4:5,6,7,8:1.0\n",
    }
    path = tmp_path / "ArticularyWordRecognition.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for part, content in parts.items():
            archive.writestr(f"ArticularyWordRecognition_{part}.ts", head + content)
    arrays = RECIPES["articulary-word"].convert([path])
    assert arrays["x_train"].shape == (2, 4, 2)
    assert arrays["x_train"].dtype == np.float32
    assert arrays["x_train"][1, :2].tolist() == [[7, 9], [8, 10]]
    assert np.isnan(arrays["x_train"][1, 2:]).all()
    assert arrays["y_train"].tolist() == [2, 1]  # classes 1, 2 and 10 in the order of numbers
    assert arrays["length_train"].tolist() == [3, 2]


def test_gas_readings_are_cleaned_standardized_and_thinned(tmp_path):
    pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    sensors = rng.standard_normal((1000, 3)) * 5 + 2
    columns = [rng.standard_normal((1000, 3)), sensors, sensors[:, :1] * 2 + 1]
    lines = "\n".join(" ".join(f"{value:.6f}" for value in row) for row in np.hstack(columns))
    path = tmp_path / "gas.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/ethylene_CO.txt", "Time CO Ethylene sensors\n" + lines + "\n")
    arrays = RECIPES["gas"].convert([path])
    # The first of two copies goes; the last tenth tests, the one before it validates.
    assert arrays["x_train"].shape == (81, 3)
    assert arrays["x_test"].shape == (10, 3)
    assert abs(arrays["x_train"].mean()) < 0.2


def test_copies_of_columns_go_one_at_a_time_the_first_one_first():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 500))
    x = np.stack([a, b, a * 3, -b, a + 1], axis=1)
    assert np.array_equal(downloads.without_copies(x), x[:, [1, 3, 4]])


def test_miniboone_keeps_signal_events_without_outliers_and_varied_features():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 3))
    x[:, 1] = rng.integers(0, 3, 40)  # the same values again and again
    x[4, 0] = -999.0
    signal = np.array(["True", "False"] * 20)
    arrays = downloads.signal_events(x, signal)
    kept = np.delete(x[::2][:, [0, 2]], 2, axis=0)
    assert arrays["x_train"].shape == (18, 2)
    train = kept[:-1]
    expected = (kept[-1:] - train.mean(0)) / train.std(0)
    assert np.allclose(arrays["x_test"], expected, atol=1e-6)
