"""Text ranking: items ranked beside a context by many views of their texts and categories, without any behaviour."""

from __future__ import annotations

from peft_combo.recommender.text_ranking.columns import LOOKS_ALIKE
from peft_combo.recommender.text_ranking.ranker import TextRanker
from peft_combo.recommender.text_ranking.views import TextViews

__all__ = ["LOOKS_ALIKE", "TextRanker", "TextViews"]
