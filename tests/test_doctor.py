"""The doctor finds what is wrong, and nothing where nothing is."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from peft_combo.cli import diagnostics as doctor
from peft_combo.cli.diagnostics import Finding, examine


def named(findings: tuple[Finding, ...], what: str) -> Finding:
    (found,) = [one for one in findings if one.what == what]
    return found


def test_a_fit_machine_has_no_problem(tmp_path: Path) -> None:
    findings = examine(tmp_path / "adapters")
    assert [one for one in findings if one.status == "problem"] == []
    assert named(findings, "torch").found == metadata.version("torch")
    assert named(findings, "8-bit weights").status == "ok"
    assert named(findings, "adapter store").status == "note"
    assert all(one.remedy for one in findings if one.status == "note" and one.what != "gpu")


def test_versions_are_held_against_what_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    fakes = {"transformers": "4.57.1", "peft": "0.18.0"}

    def version(name: str) -> str:
        if name == "typer":
            raise metadata.PackageNotFoundError(name)
        return fakes.get(name) or real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["transformers>=4", "peft>=0.19,<0.22", "typer>=0.15",
                                                                  'implicit>=0.7 ; extra == "als"'])  # fmt: skip
    found = list(doctor.CHECKS["packages"](Path()))
    assert [(one.what, one.status) for one in found] == [
        ("transformers", "ok"), ("peft", "problem"), ("typer", "problem"), ("transformers", "problem"),
    ]  # fmt: skip
    assert "expected <0.22,>=0.19" in found[1].found
    assert "prefix tuning" in found[3].found
    assert all(one.remedy.startswith("pip install") for one in found if one.status == "problem")


def test_a_broken_package_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(store: Path) -> Any:
        raise OSError("libcudart.so.12: cannot open shared object file\nmore")

    monkeypatch.setitem(doctor.CHECKS, "8-bit and 4-bit weights", broken)
    monkeypatch.setitem(doctor.CHECKS, "torch", lambda store: iter(()))
    found = named(examine(tmp_path), "8-bit and 4-bit weights")
    assert (found.status, found.found) == (
        "problem",
        "cannot be looked at: libcudart.so.12: cannot open shared object file",
    )


def test_a_damaged_store_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "adapters" / "fashion" / "v1").mkdir(parents=True)
    (found,) = doctor.CHECKS["adapter store"](tmp_path / "adapters")
    assert found.status == "problem"
    assert "adapters verify" in found.remedy
