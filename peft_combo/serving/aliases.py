"""Aliases to serve where none is named, and shares of traffic as a promotion gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from peft_combo.serving.errors import Conflict
from peft_combo.serving.release import FROZEN
from peft_combo.serving.state import State
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.lookup import write_tune_command


def choose_aliases(
    asked: Sequence[str], category: str, store: AdapterStore, state: State, on_note: Callable[[str], None]
) -> list[str]:
    """Return the aliases to serve: those asked for, else those of the last time, else the category's."""
    if asked:
        return list(asked)
    known = [alias for alias in state.deployments() if alias == FROZEN or alias.partition("@")[0] in store.categories()]
    if known:
        return known
    named = [alias.reference for alias in store.aliases(category)] if category in store.categories() else []
    if f"{category}@prod" in named:
        return [f"{category}@prod"]
    if category in store.categories():
        return [category]
    on_note(
        f"No adapter of the category {category} is stored, so the frozen encoder answers. Train one with: "
        f"{write_tune_command(category)}"
    )
    return [FROZEN]


def read_share(split: Mapping[str, float] | None) -> float | None:
    """Return the share of the arm `next`, in per cent; None where all of it is promoted."""
    if split is None:
        return None
    values = {name: float(share) for name, share in split.items()}
    if set(values) != {"prod", "next"} or any(not 0 <= share <= 100 for share in values.values()):
        raise Conflict(f'split: expected shares such as {{"prod": 90, "next": 10}}, found {dict(split)}.')
    if abs(sum(values.values()) - 100) > 1e-6:
        raise Conflict(f"split: shares add up to 100, found {sum(values.values()):g}.")
    return values["next"]
