"""Killed at any moment, in whatever it was doing: the store stays whole, and aliases lead to versions that open.

A few kills by default; 120 with `pytest -m slow tests/test_store_kill.py`.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_adapter_store import hidden, write

from peft_combo.store.adapter_store import AdapterStore

ROOT = Path(__file__).resolve().parent.parent

# Does everything that changes a store, over and over; says what it is about to do, so that kills can be told apart.
CHANGES = f"""
import os, random, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from contextlib import suppress
from test_adapter_store_faults import FIELDS, TENSORS
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.errors import StoreError

assert "torch" not in sys.modules
store, dice = AdapterStore(sys.argv[1]), random.Random(int(sys.argv[2]))

def save():
    with store.writing("fashion") as draft:
        for name in ("a.txt", "b.txt", "c.txt"):
            (draft.path / name).write_bytes(os.urandom(50_000))
        (draft.path / "head.safetensors").write_bytes(TENSORS)
        draft.commit(FIELDS)

def promote():
    store.alias(f"fashion@v{{dice.choice(store.versions('fashion'))}}", dice.choice(("prod", "canary")))

def rollback():
    store.rollback(f"fashion@{{dice.choice(('prod', 'canary'))}}")

def unalias():
    store.unalias("fashion@canary")

def remove():
    store.remove(f"fashion@v{{dice.choice(store.versions('fashion')[:-1])}}")

def collect():
    store.collect(2)

print("ready", flush=True)
while True:
    act = dice.choice((save, save, promote, promote, rollback, unalias, remove, collect))
    os.write(1, act.__name__.encode() + b"\\n")
    with suppress(StoreError, IndexError):  # nothing to remove, an alias points to it, nothing before
        act()
"""


def killed_in(store: AdapterStore, seed: int, after: float) -> str:
    """Let a process change the store, kill it after so many seconds; return what it was doing."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHANGES, str(store.path), str(seed)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(after)
    process.kill()
    said = process.communicate()[0]
    assert process.returncode == -9
    return said.rsplit("\n", 2)[-2] if "\n" in said else "nothing"


def check_whole(store: AdapterStore) -> None:
    assert store.verify() == []
    latest = store.open("fashion")
    assert latest.version == max(store.versions("fashion"))
    for alias in store.aliases():
        record = store.open(alias.reference)
        assert record.version == alias.version
        assert all(record.read(name) for name in record.manifest.files)
    assert store.open("fashion@prod").manifest.category == "fashion"  # set at the start and never removed


def kill_often(store: AdapterStore, kills: int) -> set[str]:
    write(store)
    store.alias("fashion@v1", "prod")
    dice = random.Random(0)
    cut_short = set()
    highest = 1
    for seed in range(kills):
        cut_short.add(killed_in(store, seed, dice.uniform(0.0, 0.25)))
        check_whole(store)
        assert store.latest("fashion") >= highest  # the last good version is never lost
        highest = store.latest("fashion")
    store.alias("fashion", "prod")  # the lock went with its holder
    store.collect(1)
    assert hidden(store, ".draft-") + hidden(store, ".trash-") == []
    assert [name for name in os.listdir(store.path / ".aliases") if name.startswith(".")] == []
    assert write(store).version > highest
    check_whole(store)
    return cut_short


def test_a_few_kills_leave_the_store_whole(tmp_path: Path) -> None:
    kill_often(AdapterStore(tmp_path / "adapters"), 5)


@pytest.mark.slow
def test_very_many_kills_in_the_middle_of_everything_leave_the_store_whole(tmp_path: Path) -> None:
    cut_short = kill_often(AdapterStore(tmp_path / "adapters"), 120)
    assert {"save", "promote", "rollback", "remove", "collect"} <= cut_short
