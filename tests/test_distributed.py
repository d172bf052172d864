"""Shares over workers: every one done once whoever dies, on processes, on a real local Ray cluster, and as jobs."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import share_functions
from conftest import REPOSITORY
from numpy.typing import NDArray
from share_functions import Here
from test_bank import store_adapter

from peft_combo.data.readers.text_column import TextColumn
from peft_combo.distributed import LocalExecutor, LostShare, RayExecutor, SlurmExecutor, cut_blocks
from peft_combo.distributed.ray_actors import fit_cores
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.fixed_encoder import encode_share, find_encoder
from peft_combo.encoder.shards import MANIFEST, embed_shards, open_shard, read_shards
from peft_combo.encoder.vectors import VectorCache, embed
from peft_combo.errors import DataError, PeftComboError, StoreError
from peft_combo.store.adapter_store import AdapterStore

TEXTS = [f"w{number % 190} w{(number * 7) % 190} w{number // 190}" for number in range(400)]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", autouse=True)
def import_path() -> Iterator[None]:
    """Let workers of any kind find the package and the functions of the tests."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "tests"), before or ""))
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def local() -> Iterator[LocalExecutor]:
    with LocalExecutor(2) as executor:
        yield executor


@pytest.fixture(scope="module")
def ray() -> Iterator[RayExecutor]:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Ray uses of others is its own affair
        with RayExecutor(2) as executor:
            yield executor


@pytest.fixture(params=["local", "ray"])
def executor(request: pytest.FixtureRequest) -> Iterator[Any]:
    found = request.getfixturevalue(request.param)
    notes: list[str] = []
    found.on_note = notes.append
    found.notes = notes
    yield found
    found.on_note = lambda note: None


@pytest.fixture(scope="module")
def bank(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> AdapterBank:
    backbone = Backbone.load(str(tiny_bert), max_length=16)
    store = AdapterStore(tmp_path_factory.mktemp("adapters"))
    store_adapter(store, backbone, "food", seed=0)
    store_adapter(store, backbone, "tools", seed=1)
    return AdapterBank(backbone, store)


class Blocks:
    """Texts in memory, as `embed_shards` reads them."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts, self.rows = list(texts), len(texts)

    def blocks(self, size: int) -> Iterator[list[str]]:
        return (self.texts[start : start + size] for start in range(0, self.rows, size))


def stack(folder: Path) -> NDArray[np.float32]:
    return np.concatenate([open_shard(folder, shard) for shard in read_shards(folder).shards])


# --- shares -----------------------------------------------------------------------------------------------------------


def test_every_share_comes_back_with_its_number(executor: Any) -> None:
    shares = ({"numbers": np.arange(number, number + 3), "words": ["a", f"b{number}"]} for number in range(9))
    found = dict(executor.map_shares(share_functions.double, shares))
    assert sorted(found) == list(range(9))
    for number, (numbers, words) in found.items():
        np.testing.assert_array_equal(numbers, 2 * np.arange(number, number + 3))
        assert words == ["A", f"B{number}"]
    assert list(executor.map_shares(share_functions.double, [])) == []


def test_shares_are_read_as_workers_become_free(executor: Any) -> None:
    read = []

    def shares() -> Iterator[int]:
        for number in range(40):
            read.append(number)
            yield number

    results = executor.map_shares(share_functions.tell_process, shares())
    first = next(results)
    assert len(read) <= 4  # one for each of two workers, one at hand, and one for who has answered
    results.close()
    assert isinstance(first[1], int)
    assert len(list(executor.map_shares(share_functions.tell_process, range(6)))) == 6


def test_what_a_killed_worker_had_is_done_by_another(executor: Any, tmp_path: Path) -> None:
    mark = str(tmp_path / "killed")
    shares = [{"number": number, "mark": mark if number == 3 else None} for number in range(10)]
    assert dict(executor.map_shares(share_functions.die_once, shares)) == {n: n**2 for n in range(10)}
    assert len(executor.notes) == 1
    assert "is done again by another" in executor.notes[0]
    assert len(executor.pids) <= 2


def test_a_share_that_kills_whoever_has_it_is_given_up_and_the_others_are_done(executor: Any) -> None:
    found = dict(executor.map_shares(share_functions.die_of_two, [{"number": number} for number in range(5)]))
    assert {number: value for number, value in found.items() if number != 2} == {0: 0, 1: 1, 3: 3, 4: 4}
    assert isinstance(found[2], LostShare)
    assert found[2].reason.startswith("3 workers in turn ended over it")


def test_errors_come_over_as_what_they_are(executor: Any) -> None:
    with pytest.raises(PeftComboError, match=r"^No 7\. Take another\.$"):
        list(executor.map_shares(share_functions.refuse, [7]))
    with pytest.raises(RuntimeError, match=r"(?s)In a worker:.*break_down.*ZeroDivisionError"):
        list(executor.map_shares(share_functions.break_down, [7]))
    with pytest.raises(ValueError, match="function: expected one at the top of a module"):
        executor.map_shares(lambda share: share, [1])


def test_a_worker_ends_with_who_started_it(local: LocalExecutor) -> None:
    with LocalExecutor(1) as other:
        ((_, pid),) = other.map_shares(share_functions.tell_process, [0])
        (same,) = other.pids
        assert pid == same
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_gpus_and_cores_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_combo.distributed import local as module

    monkeypatch.setattr(module, "count_usable_cpus", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert [LocalExecutor(workers, gpus=gpus).workers for workers, gpus in ((None, 0), (None, 2), (3, 2))] == [4, 2, 3]
    assert LocalExecutor(4).told == "each has 4 of the cores"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert module._list_visible(2) == ["GPU-a", "GPU-b"]
    assert module._list_visible(3) == ["0", "1", "2"]
    with pytest.raises(ValueError, match="workers: expected 1 or more"):
        LocalExecutor(0)


def test_blocks_are_several_for_each_worker_and_cover_every_row() -> None:
    for count, workers, most in ((0, 2, 10), (1, 2, 10), (7, 2, 100), (1000, 2, 100), (1000, 3, 100_000)):
        blocks = cut_blocks(count, workers, most)
        assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(count))
        assert all(block.stop - block.start <= most for block in blocks)
        assert len(blocks) >= min(count, 4 * workers) * 3 // 4


@pytest.mark.parametrize(
    ("nodes", "workers", "cores"),
    [
        ([2.0], 2, 1),
        ([3.0], 2, 1),
        ([5.0], 2, 2),
        ([16.0, 16.0], 2, 15),
        ([16.0, 16.0], 3, 8),
        ([4.0], 9, 1),
        ([], 1, 1),
    ],
)
def test_cores_are_shared_so_that_all_fit_and_one_stays_free(nodes: list[float], workers: int, cores: int) -> None:
    assert fit_cores(nodes, workers) == cores


# --- Ray --------------------------------------------------------------------------------------------------------------


def test_a_cluster_without_room_says_so_in_time(ray: RayExecutor) -> None:
    import ray as library

    ray._crew.close()  # its workers make room
    holders = [library.remote(num_cpus=3)(share_functions.Holder).remote()]
    library.get(holders[0].greet.remote())
    try:
        with RayExecutor(1, patience=1.5) as crowded, pytest.raises(PeftComboError) as caught:
            list(crowded.map_shares(share_functions.tell_process, [1]))
    finally:
        library.kill(holders[0])
    told = str(caught.value)
    assert told.startswith("Ray started none of 1 workers within 1.5 s. Each takes")
    assert "the cluster has 3 CPUs (0 free)" in told
    assert library.is_initialized()  # who did not start it does not end it


def test_no_cluster_at_an_address_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.setattr(library, "is_initialized", lambda: False)
    clock = time.monotonic()
    with pytest.raises(PeftComboError, match=r"There is no Ray cluster at 127\.0\.0\.1:1: .*ray start --head"):
        RayExecutor(2, "127.0.0.1:1")
    assert time.monotonic() - clock < 15


@pytest.mark.parametrize(("package", "extra"), [("ray", "ray"), ("submitit", "slurm")])
def test_an_extra_that_is_missing_is_named(
    package: str, extra: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PeftComboError, match=rf"pip install 'peft-combo\[{extra}\]'"):
        RayExecutor(2) if package == "ray" else SlurmExecutor(tmp_path)


# --- SLURM ------------------------------------------------------------------------------------------------------------


def test_jobs_do_shares_and_one_that_dies_is_submitted_again(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    notes: list[str] = []
    shares = [{"number": number, "mark": str(tmp_path / "killed") if number == 1 else None} for number in range(3)]
    with SlurmExecutor(tmp_path / "jobs", cluster="local", on_note=notes.append, poll_seconds=0.05) as executor:
        assert dict(executor.map_shares(share_functions.die_once, shares)) == {0: 0, 1: 1, 2: 4}
    assert len(notes) == 1
    assert "It is submitted again." in notes[0]


def test_a_machine_without_slurm_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PeftComboError, match=r"There is no SLURM on this machine .*--on local"):
        SlurmExecutor(tmp_path / "jobs")


# --- vectors ----------------------------------------------------------------------------------------------------------


def test_a_killed_ray_worker_leaves_no_trace_in_the_vectors(
    bank: AdapterBank, ray: RayExecutor, tmp_path: Path
) -> None:
    expected = bank.encode(TEXTS, "food")
    told: list[int] = []

    def kill_one(rows: int) -> None:
        if not told:
            os.kill(ray.pids[0], signal.SIGKILL)
        told.append(rows)

    quiet, killed = VectorCache(tmp_path / "quiet", block_rows=40), VectorCache(tmp_path / "killed", block_rows=40)
    notes: list[str] = []
    ray.on_note = notes.append
    assert embed(bank, TEXTS, "food", quiet.folder, executor=ray) == len(set(TEXTS))
    assert notes == []
    assert embed(bank, TEXTS, "food", killed.folder, executor=ray, progress=kill_one) == len(set(TEXTS))
    assert len(told) >= 8
    assert sum(told) == len(set(TEXTS))
    found = [cache.vectors(bank, TEXTS, "food") for cache in (quiet, killed)]
    np.testing.assert_allclose(found[0], expected, atol=1e-6)
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)
    assert isinstance(found[1], np.memmap)
    # The same over a file of texts, in shards, with the same workers.
    done = embed_shards(bank, Blocks(TEXTS), "food", tmp_path / "shards", executor=ray)
    assert len(done.manifest.shards) == 8
    np.testing.assert_allclose(stack(tmp_path / "shards"), expected, atol=1e-6)


def test_who_hands_out_may_die_too_and_only_the_rest_is_encoded_again(bank: AdapterBank, tmp_path: Path) -> None:
    for go, kind in enumerate(("cache", "shards")):
        first, second = Here(2), Here()
        for executor in (first, second):
            embed_to = {
                "cache": lambda one: embed(bank, TEXTS, "food", tmp_path / "cache", executor=one),
                "shards": lambda one: embed_shards(bank, Blocks(TEXTS), "food", tmp_path / "shards", executor=one),
            }[kind]
            if executor is first:
                with pytest.raises(KeyboardInterrupt):
                    embed_to(executor)
            else:
                embed_to(executor)
        assert (first.done, second.done) == (2, 4 if not go else 2)
    assert VectorCache(tmp_path / "cache").missing(bank, TEXTS, "food") == 0


class Losing(Here):
    """An executor whose second share kills every worker."""

    def map_shares(self, function: Callable[[Any], Any], shares: Any) -> Iterator[tuple[int, Any]]:
        for number, share in enumerate(shares):
            yield number, LostShare("3 workers ended over it") if number == 1 else function(share)


def test_a_block_that_is_given_up_is_told_and_the_others_are_kept(bank: AdapterBank, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"100 texts were not encoded: 3 workers .* The others are kept; try again\."):
        embed(bank, TEXTS, "food", tmp_path / "cache", executor=Losing())
    assert VectorCache(tmp_path / "cache").missing(bank, TEXTS, "food") == 100
    with pytest.raises(StoreError, match=r"100 texts were not encoded: 3 workers"):
        embed_shards(bank, Blocks(TEXTS), "food", tmp_path / "shards", executor=Losing())
    assert not (tmp_path / "shards" / MANIFEST).exists()
    assert embed_shards(bank, Blocks(TEXTS), "food", tmp_path / "shards").encoded == 100


def test_a_worker_puts_the_same_words_before_each_text(tiny_bert: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(str(tiny_bert), max_length=16, text_prefix="w7 ")
    encoder = find_encoder(AdapterBank(backbone, AdapterStore(tmp_path)), None)
    np.testing.assert_allclose(encode_share(encoder.build_share(["w1"])), backbone.encode(["w1"]), atol=1e-6)


def test_a_worker_with_another_adapter_refuses(bank: AdapterBank, tmp_path: Path) -> None:
    share = find_encoder(bank, "food").build_share(["w1"])
    told = json.loads(share["encoder"])
    assert encode_share(share).shape == (1, 32)
    with pytest.raises(StoreError, match="has another encoder or another food@v1 than who asked it"):
        encode_share({**share, "encoder": json.dumps({**told, "key": "0" * 64})})


# --- shards -----------------------------------------------------------------------------------------------------------


def test_shards_hold_every_text_in_order_and_say_whose_they_are(bank: AdapterBank, tmp_path: Path) -> None:
    told: list[int] = []
    done = embed_shards(bank, Blocks(TEXTS), "food", tmp_path, shard_rows=150, progress=told.append)
    assert (done.encoded, done.kept, told) == (400, 0, [150, 150, 100])
    manifest = read_shards(tmp_path)
    assert manifest == done.manifest
    assert [shard.rows for shard in manifest.shards] == [150, 150, 100]
    assert (manifest.adapter, manifest.rows, manifest.dim) == ("food@v1", 400, 32)
    assert manifest.encoder["adapter"] == bank.get("food").digest
    assert manifest.encoder["backbone"] == bank.backbone.fingerprint
    np.testing.assert_allclose(stack(tmp_path), bank.encode(TEXTS, "food"), atol=1e-6)
    again = embed_shards(bank, Blocks(TEXTS), "food", tmp_path)  # in the same cut
    assert (again.encoded, again.kept, again.manifest) == (0, 400, manifest)


def test_only_what_changed_or_was_damaged_is_encoded_again(bank: AdapterBank, tmp_path: Path) -> None:
    embed_shards(bank, Blocks(TEXTS), "food", tmp_path, shard_rows=100)
    changed = [*TEXTS[:100], "w5", *TEXTS[101:]]
    assert embed_shards(bank, Blocks(changed), "food", tmp_path).encoded == 100
    file = tmp_path / "shard-00003.npy"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(StoreError, match=r"shard-00003\.npy is missing or not what was written"):
        stack(tmp_path)
    assert embed_shards(bank, Blocks(changed), "food", tmp_path).encoded == 100
    np.testing.assert_allclose(stack(tmp_path), bank.encode(changed, "food"), atol=1e-6)
    assert embed_shards(bank, Blocks(changed[:200]), "food", tmp_path).encoded == 0
    assert sorted(path.name for path in tmp_path.glob("*.npy")) == ["shard-00000.npy", "shard-00001.npy"]
    with pytest.raises(StoreError, match=r"holds vectors of food@v1, these would be of tools@v1 .* Name another"):
        embed_shards(bank, Blocks(TEXTS), "tools", tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(StoreError, match="holds no vectors, or not all of them"):
        read_shards(tmp_path)
    with pytest.raises(StoreError, match="holds vectors of another adapter or encoder"):
        embed_shards(bank, Blocks(TEXTS), None, tmp_path)


def test_a_column_of_a_parquet_file_is_read_in_blocks(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "items.parquet"
    titles = [None if row == 3 else f"title {row}" for row in range(25)]
    pq.write_table(pa.table({"title": titles, "number": list(range(25))}), file, row_group_size=7)
    column = TextColumn(file, "title")
    blocks = list(column.blocks(10))
    assert (column.rows, [len(block) for block in blocks]) == (25, [10, 10, 5])
    assert [text for block in blocks for text in block] == [title or "" for title in titles]
    for path, name, told in (
        (file, "titel", r"has no column 'titel'\. Columns: title, number\. .*Did you mean \"title\"\?"),
        (file, "number", r"'number' holds int64, expected texts"),
        (tmp_path / "none.parquet", "title", "cannot be read as a Parquet file: No such file"),
        (REPOSITORY / "README.md", "title", "cannot be read as a Parquet file"),
    ):
        with pytest.raises(DataError, match=told):
            TextColumn(path, name)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_embed_hands_work_to_processes(
    shell: Run, tiny_recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(json.dumps(tiny_recipe().model_dump(mode="json")))
    pq.write_table(pa.table({"text": TEXTS}), "items.parquet")
    code, out, err = shell("embed", "-r", "./tiny.yaml", "--on", "local", "--workers", 2)
    assert code == 0, err
    assert " 120 texts encoded now" in out
    assert "2 workers on this machine: each has" in err
    code, out, _ = shell("embed", "-r", "./tiny.yaml", "--on", "local", "--workers", 2)
    assert " 0 texts encoded now" in out  # and no worker was started
    use = ("embed", "-r", "./tiny.yaml", "--texts", "items.parquet", "--to", "shards")
    assert shell(*use)[1] == (
        "400 texts of items.parquet in shards for the frozen encoder: 1 shards of 32 columns; 400 texts encoded now\n"
    )
    assert shell(*use)[1].endswith("0 texts encoded now, 400 kept from before\n")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--workers", 2), "--workers means nothing without --on"),
        (("--on", "local", "--address", "auto"), "--address means nothing without --on ray"),
        (("--texts", "x.parquet"), "--texts means nothing without --to"),
        (("--to", "x"), "--to means nothing without --texts"),
        (("--column", "x"), "--column means nothing without --texts"),
        (("--texts", "x.parquet", "--to", "x"), "--texts: there is no file x.parquet. Expected a Parquet file"),
    ],
)
def test_embed_refuses_what_means_nothing(
    shell: Run,
    tiny_recipe: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: Any,
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(json.dumps(tiny_recipe().model_dump(mode="json")))
    code, out, err = shell("embed", "-r", "./tiny.yaml", *options)
    assert (code, out) == (1, "")
    assert told in err


def test_embed_hands_no_work_out_under_accelerate(shell: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = shell("embed", "-r", "lora-fashion", "--on", "local")
    assert code == 1
    assert "Start it without accelerate launch" in err
