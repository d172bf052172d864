"""The composer's weights are those that held-out bundles ask for."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from test_composing import SLOTS, outfits, parts_of, shop

from peft_combo.data.queries import Queries
from peft_combo.recommender.composing.composer import Composer
from peft_combo.recommender.composing.constraints import Constraints
from peft_combo.recommender.composing.fit_weights import LEAST_COMPATIBILITY, fit_weights
from peft_combo.recommender.composing.options import ModeWeights, ObjectiveWeights, Options
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


def answering(scores: NDArray[np.float32]) -> Fitted:
    """Answer questions by the row of scores of the first item that is there."""
    return lambda part: scores[part.contexts[:, 0]]


def test_slots_count_where_they_tell_the_answer(composer: Composer) -> None:
    questions, noise = asked()
    found = fit_weights(composer, questions, answering(noise), None)
    assert min(found.item.slots, found.basket.slots) > 0
    # Nothing compatible was offered to choose from, so nothing speaks for it.
    assert found.item.compatibility == found.basket.compatibility == 0


def test_slots_do_not_count_where_they_mislead(composer: Composer) -> None:
    questions, scores = asked()
    # The right answer is now of the item's own slot, which no template has twice, and the scores know it, just.
    own = np.roll(np.arange(EACH), 1)
    targets = np.concatenate([slot * EACH + own for slot in range(4)])
    scores[np.arange(len(targets)), targets] = 1.05
    misled = Queries(questions.contexts, targets, questions.groups, questions.bundles)
    found = fit_weights(composer, misled, answering(scores), None)
    assert found.basket.slots == 0


def test_compatibility_counts_as_far_as_it_helps(composer: Composer) -> None:
    questions, noise = asked()
    right = noise.copy()
    right[np.arange(len(questions)), questions.targets] = 3
    found = fit_weights(composer, questions, answering(noise), answering(right))
    assert found.basket.compatibility >= 0.5
    # Beside one item composing asks for nothing that relevance was not asked for, but it asks the better scorer.
    assert found.item.compatibility >= 0.5
    found = fit_weights(composer, questions, answering(right), answering(right))
    # The answer is known already: all weights are as good, so those with the most order are taken.
    assert (found.basket.slots, found.basket.compatibility) == (0.5, 1.0)
    # And where what is compatible says the opposite, it is not listened to.
    wrong = -right
    assert fit_weights(composer, questions, answering(right), answering(wrong)).item.compatibility == 0


def test_a_text_and_a_user_are_weighed_by_what_they_leave_open(composer: Composer) -> None:
    questions, noise = asked()
    # Every user has two bundles, and what is bought beside the one says nothing of the other.
    pairs = Queries(questions.contexts, questions.targets, (questions.bundles // 2).astype(np.str_), questions.bundles)
    right = noise.copy()
    right[np.arange(len(questions)), questions.targets] = 3
    vectors = np.random.default_rng(1).normal(size=(len(questions), 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = fit_weights(composer, pairs, answering(right), answering(right), vectors=vectors)
    assert min(found.query.compatibility, found.user.compatibility) >= 0.5
    # A name that tells the missing item needs nothing else; what else is as good stays.
    names = vectors[questions.targets]
    misled = fit_weights(composer, pairs, answering(right), answering(-right), names, vectors=vectors)
    assert misled.query.compatibility == misled.user.compatibility == LEAST_COMPATIBILITY
    assert misled.basket.compatibility == 0


def test_a_request_has_the_weights_of_its_kind() -> None:
    kinds = ModeWeights(*(ObjectiveWeights(slots=slots) for slots in (1, 2, 3, 4)))
    chosen = [
        kinds.select(n, query=query).slots for n, query in ((0, True), (0, False), (2, True), (3, False), (1, True))
    ]
    assert chosen == [1, 2, 3, 3, 4]


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
