"""Text augmentation: variants of a text that mean nearly the same, made once before training.

Owns the kinds of change and that an altered text is a function of seed and text alone, whatever else is in the
catalogue. Sees texts and brands; knows nothing of labels, tokens or training. Phrases come from `data.lexicon`.
Source: Wei and Zou 2019, "EDA" (synonyms, words left out, changed order); Sennrich et al. 2016, "Improving neural
    machine translation models with monolingual data" (back-translation, as a function of the caller's).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from peft_combo.data.augmentation.lexicon import Lexicon, read_lexicon
from peft_combo.data.labels.texts import text_key
from peft_combo.data.model import Catalog
from peft_combo.errors import DataError, make_printable
from peft_combo.recipe.augmentation import AugmentationConfig
from peft_combo.recipe.fields import format_value

Rewrite = Callable[[Sequence[str]], Sequence[str]]
"""Says a batch of texts in other words, for example by translating there and back: as many texts as it got."""

# Texts a caller's function gets at once: a translation model works through them in one forward pass.
_REWRITTEN_AT_ONCE = 64
_DASH = r"\s+[-–—]\s+"
_BREAK = re.compile(
    rf"\s*,\s+|,(?=[^\s\d])|\s*\|\s*|\s*;\s+|{_DASH}|\s+(?=(?:with|without|for|in|by)\s)", re.IGNORECASE
)
_PREPOSITION = re.compile(r"(?:with|without|for|in|by)\s", re.IGNORECASE)
_ENDS = " ,;:|-–—"


def find_brands(catalog: Catalog) -> tuple[str | None, ...] | None:
    """Return the brand of each item, or None where the catalogue has no such column."""
    return catalog.attributes.get("brand")


def make_variants(
    texts: Sequence[str],
    config: AugmentationConfig,
    *,
    brands: Sequence[str | None] | None = None,
    rewrite: Rewrite | None = None,
    seed: int,
) -> list[list[str]]:
    """Make the altered texts of each text.

    Each goes through these changes in turn, each by its chance: the brand is left out, the parts of the title change
    places, phrases give way to synonyms or to other values of their attribute, words are left out. Where the caller
    rewrites, the first, third ... start from the rewritten text, and the first is that text as it is.

    Args:
        texts: as `Catalog.texts` gives them.
        config: which changes, how often, and how many texts.
        brands: of each text, for `config.brand_mask`, which does nothing to a text of unknown brand.
        rewrite: back-translation or the like.
        seed: with the text and its brand this decides everything, so more texts change nothing, and more
            `config.variants` only add to those that were there.
    Returns:
        per text at most `config.variants` texts, distinct but for case and not the text itself; none where nothing in
        it can be changed.
    Raises:
        DataError: the lexicon cannot be used, or `rewrite` failed or did not give a text for each.
        ValueError: not as many brands as texts.
    """
    if brands is not None and len(brands) != len(texts):
        raise ValueError(f"{len(texts)} texts but {len(brands)} brands")
    lexicon = read_lexicon(config.lexicon)
    rewritten = _rewrite(texts, rewrite) if rewrite is not None else {}
    made: dict[tuple[str, str | None], list[str]] = {}
    altered: list[list[str]] = []
    for row, text in enumerate(texts):
        key = text, brands[row] if brands is not None else None
        if key not in made:
            made[key] = _vary_text(text, key[1], rewritten.get(text), config, lexicon, seed)
        altered.append(made[key])
    return altered


def describe_variants(
    altered: Sequence[Sequence[str]], config: AugmentationConfig, brands: Sequence[str | None] | None
) -> list[str]:
    """Say what `variants` made of the texts, for a run's notes."""
    some = [len(own) for own in altered if own]
    mean = f", {sum(some) / len(some):.1f} each" if some else ""
    notes = [f"{len(some):,} of {len(altered):,} texts are seen altered as well{mean}"]
    if config.brand_mask and not any(brands or ()):
        notes.append("augmentation.brand_mask does nothing: the items have no brand attribute")
    return notes


def _vary_text(
    text: str, brand: str | None, rewritten: str | None, config: AugmentationConfig, lexicon: Lexicon, seed: int
) -> list[str]:
    digest = hashlib.sha256(f"{seed}:{text}".encode("utf-8", "surrogatepass")).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    seen = {text_key(text), ""}
    kept: list[str] = []
    for place in range(config.variants):
        start = text if rewritten is None or place % 2 else rewritten
        # The rewritten text is one as it is; further ones start from it.
        changed = start if start is not text and place == 0 else _apply_changes(start, brand, config, lexicon, rng)
        if text_key(changed) not in seen:
            seen.add(text_key(changed))
            kept.append(changed)
    return kept


def _apply_changes(
    text: str, brand: str | None, config: AugmentationConfig, lexicon: Lexicon, rng: np.random.Generator
) -> str:
    if brand and rng.random() < config.brand_mask:
        text = _drop_brand(text, brand)
    if rng.random() < config.shuffle:
        text = _shuffle_parts(text, rng)
    if config.synonyms or config.attributes:
        text = _replace_phrases(text, config, lexicon, rng)
    if config.word_drop:
        text = _drop_words(text, config.word_drop, rng)
    return text


def _drop_brand(text: str, brand: str) -> str:
    """Leave the brand out wherever it stands as words of its own; a text that is nothing else stays."""
    name = r"\s+".join(map(re.escape, brand.split()))
    rest = re.sub(rf"(?<!\w){name}(?:['’]s)?(?!\w)", " ", text, flags=re.IGNORECASE)
    return _tidy(rest) or text


def _shuffle_parts(text: str, rng: np.random.Generator) -> str:
    """Put the parts of a title into another order; a title of one part stays."""
    parts = _split_parts(text)
    if len(parts) < 2:
        return text
    as_it_is = list(range(len(parts)))
    order = as_it_is
    while order == as_it_is:
        order = rng.permutation(len(parts)).tolist()
    joined = parts[order[0]]
    for place in order[1:]:
        joined += (" " if _PREPOSITION.match(parts[place]) else ", ") + parts[place]
    return joined


def _split_parts(text: str) -> list[str]:
    """Cut a title at commas, dashes and "|" and before with, for, in and the like, but not inside brackets."""
    parts: list[str] = []
    start = 0
    for cut in _BREAK.finditer(text):
        before = text[: cut.start()]
        if before.count("(") + before.count("[") > before.count(")") + before.count("]"):
            continue
        parts.append(text[start : cut.start()])
        start = cut.end()
    return [part for part in (*parts, text[start:]) if part.strip(_ENDS)]


def _replace_phrases(text: str, config: AugmentationConfig, lexicon: Lexicon, rng: np.random.Generator) -> str:
    """Let phrases give way to another value of their attribute, or else to a synonym."""

    def pieces() -> Iterator[str]:
        end = 0
        for found in lexicon.find(text):
            for others, chance in ((found.attributes, config.attributes), (found.synonyms, config.synonyms)):
                if others and rng.random() < chance:
                    other = others[int(rng.integers(len(others)))]
                    yield text[end : found.start]
                    yield lexicon.in_case_of(other, text[found.start : found.stop])
                    end = found.stop
                    break
        yield text[end:]

    return "".join(pieces())


def _drop_words(text: str, chance: float, rng: np.random.Generator) -> str:
    """Leave words out, never all; a sign that stands alone ("-", "&") is no word and stays between its neighbours."""
    words = text.split()
    real = [place for place, word in enumerate(words) if any(map(str.isalnum, word))]
    out = {place for place in real if rng.random() < chance}
    if real and len(out) == len(real):
        out.discard(real[int(rng.integers(len(real)))])
    return _tidy(" ".join(word for place, word in enumerate(words) if place not in out)) if out else text


def _tidy(text: str) -> str:
    """Close the gaps that a word left: double spaces, a comma after a comma, a dash at an end."""
    text = re.sub(r"\s+(?=[,;])", "", " ".join(text.split()))
    # Of signs with nothing between them the last stays.
    return re.sub(r"(?:[,;|]\s*|(?<=\s)[-–—]\s+)+(?=[,;|]|[-–—]\s)", " ", text).strip(_ENDS)


def _rewrite(texts: Sequence[str], rewrite: Rewrite) -> dict[str, str]:
    """Let the caller's function say every distinct text in other words, a batch at a time."""
    name = getattr(rewrite, "__qualname__", type(rewrite).__name__)
    distinct = list(dict.fromkeys(texts))
    said: dict[str, str] = {}
    for start in range(0, len(distinct), _REWRITTEN_AT_ONCE):
        batch = distinct[start : start + _REWRITTEN_AT_ONCE]
        try:
            answers = list(rewrite(batch))
        except Exception as error:  # whatever a caller's model raises, the reader must know whose it is
            reason = make_printable((str(error).splitlines() or [""])[0])
            raise DataError(
                f"{name} failed on a batch of {len(batch)} texts: {type(error).__name__}: {reason}"
            ) from error
        if len(answers) != len(batch):
            raise DataError(
                f"{name} gave {len(answers)} texts for {len(batch)}; expected one for each, in their order."
            )
        for text, answer in zip(batch, answers, strict=True):
            if not isinstance(answer, str):
                raise DataError(f"{name} gave {format_value(answer)} for {format_value(text)}; expected a text.")
            said[text] = " ".join(answer.split())
    return said
