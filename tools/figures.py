"""Figures of the README and the documentation, drawn from the tables of docs/quality.md.

Run:  python tools/figures.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from peft_combo.metrics.charts import Bar, Bars, draw  # noqa: E402

SHOWN = (
    "popularity", "item-kNN", "EASE", "TF-IDF title", "CEASE-TFIDF", "frozen BERT", "tuned BERT lora", "CEASE-BERT",
    "TF-IDF, unseen first", "fusion",
)  # fmt: skip
"""Rows of the table, in its order."""


def read_rows(name: str) -> dict[str, float]:
    """Return NDCG@10 by scorer from the table between ``<!-- NAME -->`` and ``<!-- end -->``."""
    page = (REPOSITORY / "docs" / "quality.md").read_text(encoding="utf-8")
    table = page.split(f"<!-- {name} -->")[1].split("<!-- end -->")[0]
    lines = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table.splitlines() if "|" in line]
    place = lines[0].index("NDCG@10")
    return {cells[0]: float(cells[place]) for cells in lines[2:] if re.fullmatch(r"\.\d+", cells[place])}


def make_chart(name: str, title: str) -> Bars:
    """Return the rows that are shown as bars, the fusion marked."""
    rows = read_rows(name)
    bars = [Bar(one, rows[one], rows[one], rows[one], marked=one == "fusion") for one in SHOWN]
    return Bars(f"{title}: NDCG@10", bars)


CHARTS = {"clothing": "BundleRec clothing", "electronic": "BundleRec electronics"}

if __name__ == "__main__":
    for name, title in CHARTS.items():
        draw(make_chart(name, title), REPOSITORY / "docs" / "pictures" / f"quality-{name}.svg")
