"""The composer's weights are those that held-out bundles ask for."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from test_composing import SLOTS, outfits, parts_of, shop

from peft_combo.data.queries import Queries
from peft_combo.recommender.composing.composer import Composer
from peft_combo.recommender.composing.constraints import Constraints
from peft_combo.recommender.composing.fit_weights import fit_weights
from peft_combo.recommender.composing.options import ObjectiveWeights, Options
from peft_combo.recommender.fitted_scorers import Fitted

EACH = 20
PAIRS = [("top", "bottom"), ("shoes", "bag")]


@pytest.fixture
def composer() -> Composer:
    """Twenty items of each of four slots; tops go with bottoms, shoes with bags, and nothing else was seen."""
    catalog = shop({slot: [10.0] * EACH for slot in SLOTS})
    return Composer(catalog, outfits(catalog, *PAIRS * 20))


def asked() -> tuple[Queries, NDArray[np.float32]]:
    """A question for every item, answered by one of the slot that goes with it; and scores that know nothing."""
    items = np.arange(4 * EACH)
    partner = {0: 1, 1: 0, 2: 3, 3: 2}
    answers = np.array([partner[row // EACH] * EACH + row % EACH for row in items])
    questions = Queries(items[:, None], answers, items.astype(np.str_), items)
    return questions, np.random.default_rng(0).random((len(items), len(items)), np.float32)


def answering(questions: Queries, scores: NDArray[np.float32]) -> Fitted:
    """Answer some of the questions by their rows of scores."""
    return lambda part: scores[part.bundles]


def test_slots_count_where_they_tell_the_answer(composer: Composer) -> None:
    questions, noise = asked()
    found = fit_weights(composer, questions, answering(questions, noise), None)
    assert found.slots == 0.5
    # Nothing compatible was offered to choose from, so its weight stays what it is by default.
    assert found.compatibility == ObjectiveWeights().compatibility


def test_slots_do_not_count_where_they_mislead(composer: Composer) -> None:
    questions, scores = asked()
    # The right answer is now of the item's own slot, which no template has twice, and the scores know it, just.
    own = np.roll(np.arange(EACH), 1)
    targets = np.concatenate([slot * EACH + own for slot in range(4)])
    scores[np.arange(len(targets)), targets] = 1.05
    misled = Queries(questions.contexts, targets, questions.groups, questions.bundles)
    assert fit_weights(composer, misled, answering(misled, scores), None).slots == 0


def test_compatibility_counts_as_far_as_it_helps(composer: Composer) -> None:
    questions, noise = asked()
    right = noise.copy()
    right[np.arange(len(questions)), questions.targets] = 3
    assert fit_weights(composer, questions, answering(questions, noise), answering(questions, right)).compatibility == 1
    found = fit_weights(composer, questions, answering(questions, right), answering(questions, right))
    # The answer is known already: all weights are as good, so those with the most order are taken.
    assert (found.slots, found.compatibility) == (0.5, 1.0)


def test_an_item_of_a_rare_slot_is_found_where_it_fits_best() -> None:
    catalog = shop({slot: [10.0] * 700 for slot in SLOTS})
    composer = Composer(catalog, outfits(catalog, *[("top", "bottom")] * 500, ("top", "shoes"), ("bag", "shoes")))
    relevance = np.random.default_rng(0).random(len(catalog))
    best = 3 * 700 + 5  # a bag; no bundle had a top and a bag
    relevance[best] = 9
    options = Options(k=1, diversity=0, weights=ObjectiveWeights(slots=0.01))
    (found,) = composer.compose([0], relevance=relevance, constraints=Constraints(size=(2, 2)), options=options)
    assert found.added == (best,)
    # Where slots weigh much it is a bottom as ever.
    options = Options(k=1, diversity=0, weights=ObjectiveWeights(slots=5))
    (found,) = composer.compose([0], relevance=relevance, constraints=Constraints(size=(2, 2)), options=options)
    assert catalog.slots[found.added[0]] == "bottom"


def test_the_parts_of_one_item_more_are_those_of_the_objective(composer: Composer) -> None:
    relevance = np.random.default_rng(0).random(4 * EACH)
    parts = composer.score_completions([np.array([0])], relevance[None], None)
    whole = parts_of(
        composer, [0, 25], context=[0], relevance=relevance, options=Options(weights=ObjectiveWeights(slots=1))
    )
    assert parts["relevance"][0, 25] == pytest.approx(whole["relevance"])
    assert parts["slots"][0, 25] == pytest.approx(whole["slots"])


def test_a_request_s_own_weights_come_first() -> None:
    catalog = shop({slot: [10.0] * EACH for slot in SLOTS})
    templates = outfits(catalog, *PAIRS * 20)
    composer = Composer(catalog, templates, weights=ObjectiveWeights(slots=0.25))
    plain = parts_of(composer, [0, 25], context=[0])
    asked_for = parts_of(composer, [0, 25], context=[0], options=Options(weights=ObjectiveWeights(slots=0.5)))
    assert asked_for["slots"] == pytest.approx(2 * plain["slots"]) != 0
