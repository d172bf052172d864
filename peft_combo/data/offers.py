"""Offers: who was and was not made one, what followed, and what was known before; the table an uplift is read from.

Owns the form of the table and how campaigns of the Complete Journey become one. Knows nothing of estimates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.readers.completejourney import package_folder
from peft_combo.data.readers.forms import table_at
from peft_combo.data.readers.tables import read_table
from peft_combo.errors import DataError, Fault, did_you_mean

_NEEDED = ("unit", "offered", "outcome")
_WEEKS = 8  # of history that covariates are read from
_PLACEBO = 28  # days before a campaign that stand for its time in the placebo

COVARIATES = (
    "log spend", "log visits", "log spend on the set", "root spend on the set", "root late spend on the set",
    "root weekly spend on the set, ever", "log products of the set", "log joint baskets", "spend, late half",
    "days since last visit", "earlier campaigns", "campaigns at the time", "coupons redeemed", "demographics known",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Offers:
    """Rows of who might have been made an offer.

    Attributes:
        units: (M,) the customer. offered: (M,) whether it was made. outcomes: (M,) what followed.
        covariates: (M, F) what was known before; names: (F,).
        bundles: (M,) what was offered; None where there is one only.
    """

    units: NDArray[np.str_]
    offered: NDArray[np.bool_]
    outcomes: NDArray[np.float64]
    covariates: NDArray[np.float64]
    names: tuple[str, ...]
    bundles: NDArray[np.str_] | None


def read_offers(path: Path) -> Offers:
    """Read a table: unit, offered (0 or 1), outcome, perhaps bundle; every other column is a covariate, a number.

    Raises:
        DataError: a column is missing, or a cell is empty or no number.
    """
    faults: list[Fault] = []
    files = table_at(path, "offers", faults)
    table = None if files is None else read_table(files, faults, [])
    if table is None or faults:
        raise DataError.from_faults(f"The offers in {path} cannot be read:", faults)
    faults += [
        Fault(
            path.name, f"has no column {name}; there are {', '.join(table.columns)}.",
            did_you_mean(name, table.columns)
            or "Needed are unit, offered and outcome; bundle and covariates may follow.",
        )
        for name in _NEEDED
        if name not in table
    ]  # fmt: skip
    if faults:
        raise DataError.from_faults(f"The offers in {path} cannot be used:", faults)
    names = tuple(name for name in table.columns if name not in (*_NEEDED, "bundle"))
    columns = {name: table.numbers(name) for name in ("offered", "outcome", *names)}
    if not faults:
        for name, values in columns.items():
            table.blame(np.flatnonzero(np.isnan(values)), f"{name} is empty.", "Give a number, or drop the row.")
        given = columns["offered"]
        table.blame(np.flatnonzero(~np.isnan(given) & ~np.isin(given, (0, 1))), "offered is {cell}, expected 0 or 1.",
                    cell="offered")  # fmt: skip
    if faults:
        raise DataError.from_faults(f"The offers in {path} cannot be used:", faults)
    covariates = np.column_stack([columns[name] for name in names]) if names else np.zeros((table.rows, 0))
    bundles = np.array(table.strings("bundle")) if "bundle" in table else None
    return Offers(
        np.array(table.strings("unit")), columns["offered"] > 0, columns["outcome"], covariates, names, bundles
    )


def read_campaigns(
    campaigns: Sequence[str] = (), *, kinds: Sequence[str] = ("Type B", "Type C"), joint: bool = False,
    placebo: bool = False,
) -> Offers:  # fmt: skip
    """Read coupon campaigns of the Complete Journey as offers of the sets of products that their coupons name.

    A row is a household and a campaign; who was sent the campaign was offered its set together, and who was not could
    buy each product as ever. Rows are of households that bought anything in the eight weeks before. Of campaigns of
    type A each household got sixteen coupons of a pool, which ones is not recorded; they are left out by default.

    Args:
        campaigns: ids; () takes all of the kinds that begin eight weeks or more after the data do.
        joint: the outcome is the number of baskets with two products or more of the set; else spend on it, in dollars.
        placebo: the outcome is that of the four weeks before the campaign, with what was known before these: no
            offer can move it, so an effect on it is bias.
    Raises:
        DataError: the package is not installed, or has no such campaign.
    """
    import pandas as pd

    folder = package_folder()
    known = pd.read_parquet(folder / "campaign_descriptions.parquet")
    sent, coupons = (pd.read_parquet(folder / f"{name}.parquet") for name in ("campaigns", "coupons"))
    redeemed = pd.read_parquet(folder / "coupon_redemptions.parquet")
    people = set(pd.read_parquet(folder / "demographics.parquet")["household_id"].astype(str))
    columns = ["household_id", "basket_id", "product_id", "sales_value", "transaction_timestamp"]
    lines = pd.read_parquet(folder / "transactions.parquet", columns=columns)
    lines["day"] = lines["transaction_timestamp"].dt.floor("D")
    lines["household_id"] = lines["household_id"].astype(str)
    for table in (sent, coupons, redeemed, known):
        table["campaign_id"] = table["campaign_id"].astype(str)
    sent["household_id"], redeemed["household_id"] = (
        sent["household_id"].astype(str),
        redeemed["household_id"].astype(str),
    )
    shift = pd.Timedelta(days=_PLACEBO if placebo else 0)
    history = pd.Timedelta(weeks=_WEEKS)
    late = known["start_date"] - shift - history >= lines["day"].min()
    wanted = known[late & (known["campaign_id"].isin(campaigns) if campaigns else known["campaign_type"].isin(kinds))]
    if missing := set(campaigns) - set(wanted["campaign_id"]):
        raise DataError(
            f"The Complete Journey has no campaigns {', '.join(sorted(missing))} with eight weeks of data before them. "
            f"There are {', '.join(known[late]['campaign_id'])}."
        )
    found: list[Any] = []
    for one in wanted.sort_values("start_date").itertuples():
        start, products = one.start_date - shift, set(coupons[coupons["campaign_id"] == one.campaign_id]["product_id"])
        end = start + shift if placebo else one.end_date + pd.Timedelta(days=1)
        rows = _describe_households(lines, products, start, history)
        ended = known[known["start_date"] < start].merge(sent, on="campaign_id")
        rows["earlier campaigns"] = ended.groupby("household_id").size().reindex(rows.index).fillna(0)
        others = known[(known["start_date"] < end) & (known["end_date"] >= start)]
        others = others[others["campaign_id"] != one.campaign_id].merge(sent, on="campaign_id")
        rows["campaigns at the time"] = others.groupby("household_id").size().reindex(rows.index).fillna(0)
        used = redeemed[redeemed["redemption_date"] < start].groupby("household_id").size()
        rows["coupons redeemed"] = np.log1p(used.reindex(rows.index).fillna(0))
        rows["demographics known"] = rows.index.isin(list(people)).astype(float)
        rows["outcome"] = _measure_outcome(lines, products, start, end, joint).reindex(rows.index).fillna(0)
        rows["offered"] = rows.index.isin(sent[sent["campaign_id"] == one.campaign_id]["household_id"])
        found.append(rows.assign(bundle=one.campaign_id))
    whole = pd.concat(found)
    return Offers(
        whole.index.to_numpy(str), whole["offered"].to_numpy(bool), whole["outcome"].to_numpy(np.float64),
        whole[list(COVARIATES)].to_numpy(np.float64), COVARIATES, whole["bundle"].to_numpy(str),
    )  # fmt: skip


def _describe_households(lines: Any, products: set[Any], start: Any, history: Any) -> Any:
    """Return what each household did in the time before, one row for each that did anything."""
    import pandas as pd

    past = lines[(lines["day"] >= start - history) & (lines["day"] < start)]
    inside = past[past["product_id"].isin(products)]
    by = past.groupby("household_id")
    rows = pd.DataFrame(
        {"log spend": np.log1p(by["sales_value"].sum()), "log visits": np.log1p(by["basket_id"].nunique())}
    )
    own = inside.groupby("household_id")
    rows["log spend on the set"] = np.log1p(own["sales_value"].sum().reindex(rows.index).fillna(0))
    rows["log products of the set"] = np.log1p(own["product_id"].nunique().reindex(rows.index).fillna(0))
    rows["log joint baskets"] = np.log1p(_count_joint(inside).reindex(rows.index).fillna(0))
    rows["root spend on the set"] = np.sqrt(own["sales_value"].sum().reindex(rows.index).fillna(0))
    late = inside[inside["day"] >= start - history / 2].groupby("household_id")["sales_value"].sum()
    rows["root late spend on the set"] = np.sqrt(late.reindex(rows.index).fillna(0))
    ever = lines[(lines["day"] < start) & lines["product_id"].isin(products)]
    weeks = max(1.0, (start - lines["day"].min()).days / 7)
    weekly = ever.groupby("household_id")["sales_value"].sum().reindex(rows.index).fillna(0) / weeks
    rows["root weekly spend on the set, ever"] = np.sqrt(weekly)
    recent = past[past["day"] >= start - history / 2].groupby("household_id")["sales_value"].sum()
    rows["spend, late half"] = (recent.reindex(rows.index).fillna(0) / by["sales_value"].sum().clip(lower=0.01)).clip(
        0, 1
    )
    rows["days since last visit"] = (start - by["day"].max()).dt.days
    return rows


def _measure_outcome(lines: Any, products: set[Any], start: Any, end: Any, joint: bool) -> Any:
    during = lines[(lines["day"] >= start) & (lines["day"] < end) & lines["product_id"].isin(products)]
    return _count_joint(during) if joint else during.groupby("household_id")["sales_value"].sum()


def _count_joint(lines: Any) -> Any:
    """Return how many baskets of each household hold two of these products or more."""
    sizes = lines.groupby(["household_id", "basket_id"])["product_id"].nunique()
    return (sizes >= 2).groupby(level="household_id").sum()
