"""Identity of a scorer: its kind and the adapter it scores with; its label is made here, when it is printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "random", "popularity", "co-occurrence", "item-kNN", "user-kNN", "EASE", "ALS", "TF-IDF title", "CEASE-TFIDF",
    "bought before", "users alike", "frozen BERT", "tuned BERT", "ensemble", "tuned by category", "rated", "CEASE-BERT",
    "text ranker", "next basket", "fusion", "TF-IDF, unseen first", "text search", "not like",
]  # fmt: skip


@dataclass(frozen=True)
class ScorerId:
    """Which scorer: a key of tables, weights and settings.

    Attributes:
        kind: what it scores by.
        adapter: the one it scores with, for "tuned BERT" and "rated"; None for all others.
    """

    kind: Kind
    adapter: str | None = None

    def __str__(self) -> str:
        """Return the label, as tables, notes and stored files have it: "tuned BERT fashion@v1"."""
        return self.kind if self.adapter is None else f"{self.kind} {self.adapter}"

    @property
    def reads_bundle_adapters(self) -> bool:
        """Whether it is an adapter tuned on bundles, or several of them as one scorer; it comes fitted."""
        return self.kind in ("tuned BERT", "ensemble", "tuned by category")

    @property
    def stays_fitted(self) -> bool:
        """Whether it serves as it was judged on validation: it is not fitted again on all bundles."""
        return self.reads_bundle_adapters or self == TEXT_RANKER


RANDOM, PEER, FROZEN = ScorerId("random"), ScorerId("CEASE-TFIDF"), ScorerId("frozen BERT")
ENSEMBLE, BY_CATEGORY = ScorerId("ensemble"), ScorerId("tuned by category")
BOUGHT, ALIKE, NEXT_BASKET = ScorerId("bought before"), ScorerId("users alike"), ScorerId("next basket")
CEASE_BERT, TEXT_RANKER = ScorerId("CEASE-BERT"), ScorerId("text ranker")
FUSION = ScorerId("fusion")
# Of answers alone: what words found, and what likeness to rejected items takes away.
TOGETHER, TOP = ScorerId("co-occurrence"), ScorerId("popularity")
TEXT_SEARCH, NOT_LIKE = ScorerId("text search"), ScorerId("not like")
# Of reports alone: no scorer, but how much a catalogue made of bundles gives away.
WORDS, UNSEEN_FIRST = ScorerId("TF-IDF title"), ScorerId("TF-IDF, unseen first")
