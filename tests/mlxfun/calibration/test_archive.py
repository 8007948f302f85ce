"""An .npz of statistics is understood in full, or refused with the value that is wrong."""

from __future__ import annotations

import io
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest

from mlxfun.calibration.archive import Archive
from mlxfun.calibration.files import diff_files, merge_files, purge_files
from mlxfun.calibration.ranking import RankOptions, rank_files
from mlxfun.calibration.routing_stats import SUMS, RoutingStats
from mlxfun.errors import DatasetError, PlanError

LAYERS, EXPERTS = (1, 3), 4


def stats(seed: int = 0) -> RoutingStats:
    update = np.random.default_rng(seed).uniform(1, 9, (2, len(SUMS), EXPERTS))
    return RoutingStats.empty(LAYERS, EXPERTS, model="m", state="s").plus(update, 3, 40)


def contents(tmp_path: Path) -> dict[str, Any]:
    stats().save(tmp_path / "whole.npz")
    with np.load(tmp_path / "whole.npz") as archive:
        return {name: archive[name] for name in archive.files}


def one(value: Any, dtype: Any = float) -> Any:
    """Ones [L, E] with one value of another kind."""
    array = np.ones((2, EXPERTS), dtype)
    array[1, 2] = value
    return array


WRONG: list[tuple[str, Any, str]] = [
    ("freq", one(np.nan), "freq holds NaN, infinity or a number below 0"),
    ("reap_sum", one(np.inf), "reap_sum holds NaN, infinity or a number below 0"),
    ("ean_sum", one(-1.0), "ean_sum holds NaN, infinity or a number below 0"),
    ("freq", one(True, bool), "freq is not made of numbers"),
    ("freq", one("7", "U3"), "freq is not made of numbers"),
    ("weighted_freq_sum", one(1j, complex), "weighted_freq_sum is not made of numbers"),
    ("reap_sum", np.ones((2, 5)), "reap_sum is 2 x 5 where freq is 2 x 4"),
    ("reap_sum", np.ones(4), "reap_sum is 4 where freq is 2 x 4"),
    ("reap_sq_sum", np.float64(1), "reap_sq_sum is a single value where freq is 2 x 4"),
    ("samples", np.array([3, 4]), "samples is not a whole number from 0 on"),
    ("samples", np.str_("three"), "samples is not a whole number from 0 on"),
    ("samples", np.float64("nan"), "samples is not a whole number from 0 on"),
    ("samples", np.float64(2.5), "samples is not a whole number from 0 on"),
    ("tokens", np.int64(-40), "tokens is not a whole number from 0 on"),
    ("tokens", np.float64("inf"), "tokens is not a whole number from 0 on"),
    ("tokens", np.bool_(True), "tokens is not a whole number from 0 on"),
    ("sources", np.int64(0), "sources is not a whole number from 1 on"),
    ("num_layers", np.int64(3), "num_layers is 3 where freq is 2 x 4"),
    ("num_experts", np.int64(8), "num_experts is 8 where freq is 2 x 4"),
    (
        "layer_indices",
        np.array(["a", "b"]),
        "layer_indices is not a list of 2 ascending decoder layers",
    ),
    (
        "layer_indices",
        np.array([1, 3, 5]),
        "layer_indices is not a list of 2 ascending decoder layers",
    ),
    ("layer_indices", np.array([1]), "layer_indices is not a list of 2 ascending decoder layers"),
    (
        "layer_indices",
        np.array([3, 1]),
        "layer_indices is not a list of 2 ascending decoder layers",
    ),
    (
        "layer_indices",
        np.array([1, 1]),
        "layer_indices is not a list of 2 ascending decoder layers",
    ),
    (
        "layer_indices",
        np.array([-1, 3]),
        "layer_indices is not a list of 2 ascending decoder layers",
    ),
    (
        "layer_indices",
        np.array([1.5, 3]),
        "layer_indices is not a list of 2 ascending decoder layers",
    ),
    ("layer_indices", np.int64(1), "layer_indices is not a list of 2 ascending decoder layers"),
    ("combined", np.str_("max"), "combined 'max' is none of sum, rank"),
    ("model", np.float64(3), "model is not a text"),
    ("state", np.array(["a", "b"]), "state is not a text"),
    ("alive", np.ones((2, 3), bool), "alive is not true or false for each expert of 2 x 4"),
    ("alive", np.ones((2, 4)), "alive is not true or false for each expert of 2 x 4"),
    ("steered", np.str_("yes"), "steered is neither true nor false"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_value_that_cannot_be_is_named(
    tmp_path: Path, name: str, value: Any, message: str
) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **(contents(tmp_path) | {name: value}))
    with pytest.raises(DatasetError) as refusal:
        RoutingStats.read(path)
    assert str(refusal.value) == (
        f"{path}: {message}; give a file written by `stats save`, or collect anew"
    )


@pytest.mark.parametrize(
    "use",
    [
        diff_files,
        lambda good, bad, out: merge_files((good, bad), out),
        purge_files,
        lambda good, bad, out: rank_files((good, bad), RankOptions(n_prune=1), out),
        lambda good, bad, out: RoutingStats.load(bad, LAYERS, EXPERTS),
    ],
    ids=["diff", "merge", "purge", "rank", "load"],
)
def test_whatever_reads_statistics_checks_them(tmp_path: Path, use: Callable[..., Any]) -> None:
    np.savez(tmp_path / "bad.npz", **(contents(tmp_path) | {"freq": one(np.nan)}))
    with pytest.raises(DatasetError, match="freq holds NaN"):
        use(tmp_path / "whole.npz", tmp_path / "bad.npz", tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


def plain_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.ones((2, 4)))


def objects(path: Path) -> None:
    np.savez(path, freq=np.array([{}]), reap_sum=np.ones((2, 4)))


def enormous(path: Path) -> None:
    """An array that says it has a million million values, and has none."""
    head = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    head += b" " * (117 - len(head)) + b"\n"
    with ZipFile(path, "w") as archive:
        for name in ("freq.npy", "reap_sum.npy"):
            archive.writestr(name, b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head)


def text(path: Path) -> None:
    path.write_text("freq,1,2")


@pytest.mark.parametrize("make", [plain_array, objects, enormous, text])
def test_a_file_of_another_kind_is_one_sentence(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "x.npz"
    make(path)
    with pytest.raises(DatasetError) as refusal:
        RoutingStats.read(path)
    assert str(refusal.value) == (
        f"{path} is not an .npz of routing statistics, or is damaged; give a file written by "
        "`stats save`"
    )


def test_a_directory_is_called_one_and_an_empty_table_too(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"is a directory; give a file written by `stats save`"):
        RoutingStats.read(tmp_path)
    np.savez(tmp_path / "e.npz", freq=np.ones((0, 4)), reap_sum=np.ones((0, 4)))
    with pytest.raises(DatasetError, match="freq is 0 x 4, which is no layers x experts"):
        RoutingStats.read(tmp_path / "e.npz")


def test_statistics_of_other_decoder_layers_are_refused_for_a_model_of_the_same_shape(
    tmp_path: Path,
) -> None:
    stats().save(tmp_path / "s.npz")
    with pytest.raises(PlanError, match=r"of the decoder layers 1, 3; the model's are 2, 3"):
        RoutingStats.load(tmp_path / "s.npz", (2, 3), EXPERTS)


def ancestors(path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    names = ("reap_sum", "reap_count", "ean_sum", "freq", "weighted_freq_sum")
    np.savez(path, **{n: rng.uniform(1, 9, (2, 4)) for n in names}, num_layers=2, num_experts=4)
    return path


def test_files_without_layers_load_for_any_model_of_the_shape_merged_ones_too(
    tmp_path: Path,
) -> None:
    a, b = ancestors(tmp_path / "a.npz", 1), ancestors(tmp_path / "b.npz", 2)
    assert RoutingStats.load(a, LAYERS, EXPERTS).layer_indices == LAYERS
    merge_files((a, b), tmp_path / "m.npz")
    merged = RoutingStats.load(tmp_path / "m.npz", LAYERS, EXPERTS)
    assert merged.layer_indices == LAYERS
    with np.load(a) as one, np.load(b) as two:
        np.testing.assert_allclose(merged.sums["freq"], one["freq"] + two["freq"])


def test_whole_numbers_of_any_width_are_counts(tmp_path: Path) -> None:
    found = contents(tmp_path) | {
        "freq": np.full((2, 4), 7, np.uint8), "samples": np.float64(3), "tokens": np.int32(9),
    }  # fmt: skip
    np.savez(tmp_path / "n.npz", **found)
    read = RoutingStats.read(tmp_path / "n.npz")
    assert read.sums["freq"].dtype == np.float64
    assert (read.sums["freq"][0, 0], read.samples, read.tokens) == (7.0, 3, 9)


def npz(path: Path, **members: bytes) -> Path:
    with ZipFile(path, "w", ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def header(shape: tuple[int, ...], body: bytes) -> bytes:
    stream = io.BytesIO()
    described = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, described)
    return stream.getvalue() + body


def test_a_file_that_unpacks_to_gigabytes_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    zeros = header((1 << 14, 1 << 11), b"\0" * (1 << 28))
    path = npz(tmp_path / "bomb.npz", freq=zeros, reap_sum=zeros)
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    with pytest.raises(DatasetError, match=r"holds 2 arrays of 512 MiB when unpacked"):
        Archive(path)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_an_array_whose_header_claims_more_than_there_is_is_not_made_room_for(
    tmp_path: Path,
) -> None:
    path = npz(tmp_path / "x.npz", freq=header((1 << 20, 1 << 15), b"\0" * 64), reap_sum=b"")
    with pytest.raises(DatasetError, match=r"is not an .npz of routing statistics, or is damaged"):
        Archive(path)


def test_many_arrays_are_refused(tmp_path: Path) -> None:
    path = npz(tmp_path / "x.npz", **{f"a{i}": b"" for i in range(1000)})
    with pytest.raises(DatasetError, match="holds 1,000 arrays"):
        Archive(path)


def test_pipes_and_devices_are_no_statistics(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.npz")
    for path in (tmp_path / "x.npz", Path("/dev/zero")):
        with pytest.raises(DatasetError, match="a pipe or a device"):
            Archive(path)
