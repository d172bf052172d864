"""Altered texts: what each kind of change does to a title, worked out by hand, and what never changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from peft_combo.data.augmentation import lexicon as lexicon_module
from peft_combo.data.augmentation import wordnet
from peft_combo.data.augmentation.lexicon import SHIPPED, read_lexicon
from peft_combo.data.augmentation.variants import describe_variants, find_brands, make_variants
from peft_combo.data.augmentation.wordnet import read_wordnet
from peft_combo.data.labels.texts import text_key
from peft_combo.data.model import Catalog
from peft_combo.errors import DataError
from peft_combo.recipe.augmentation import AugmentationConfig

# So near to 1 that a change is certain for every seed used here.
SURE = 0.999999
OWN = """
nouns:
  - [t-shirt, tee]
  - [denim jacket, jean jacket]
words:
  - [women's, ladies']
  - [TV, television]
attributes:
  colour: [red, blue]
  fabric: [denim, linen]
keep:
  - red wine
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    file = tmp_path / "own.yaml"
    file.write_text(OWN)
    return str(file)


def first(text: str, seed: int = 0, brand: str | None = None, **chances: object) -> str:
    (made,) = make_variants([text], AugmentationConfig(variants=1, **chances), brands=[brand], seed=seed)  # type: ignore[arg-type]
    return made[0] if made else text


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("a tee", "a t-shirt"),
        ("Two Tees", "Two T-Shirts"),
        ("TEES AND MORE", "T-SHIRTS AND MORE"),
        ("T-shirt of cotton", "Tee of cotton"),
        ("t shirt", "tee"),
        ("Denim jacket", "Jean jacket"),
        ("Denim Jackets", "Jean Jackets"),
        ("Women’s tee, plain", "Ladies' t-shirt, plain"),
        ("4K TV stand", "4K television stand"),
        ("a golf-tee set", "a golf-tee set"),
        ("manatee", "manatee"),
    ],
)
def test_a_phrase_gives_way_to_its_synonym_in_its_own_case_and_number(own: str, text: str, changed: str) -> None:
    assert first(text, synonyms=SURE, lexicon=own) == changed


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("Red linen tee", "Blue denim tee"),
        ("Red denim jacket", "Blue denim jacket"),  # the longer phrase is no material
        ("red wine, red cup", "red wine, blue cup"),
        ("RED/BLUE", "BLUE/RED"),
        ("infra-red lamp", "infra-red lamp"),
    ],
)
def test_a_value_gives_way_to_another_of_its_kind(own: str, text: str, changed: str) -> None:
    assert first(text, attributes=SURE, lexicon=own) == changed


def test_a_brand_is_left_out_where_it_is_known_and_stands_alone() -> None:
    assert first("Nike's Air, Nike - Shoe", brand="nike", brand_mask=SURE) == "Air - Shoe"
    assert first("Black & Decker drill", brand="Black & Decker", brand_mask=SURE) == "drill"
    assert first("Levis Jeans", brand="Levi", brand_mask=SURE) == "Levis Jeans"
    assert first("Nike", brand="Nike", brand_mask=SURE) == "Nike"
    assert first("Nike Air", brand=None, brand_mask=SURE) == "Nike Air"


def test_brands_come_from_the_catalogue_and_their_absence_is_told() -> None:
    named = Catalog.build(["a"], ["Nike Air"], attributes={"brand": ["Nike"]})
    assert find_brands(named) == ("Nike",)
    plain = Catalog.build(["a"], ["Nike Air"])
    config = AugmentationConfig(brand_mask=0.5)
    assert find_brands(plain) is None
    assert describe_variants([["x", "y"], []], config, None) == [
        "1 of 2 texts are seen altered as well, 2.0 each",
        "augmentation.brand_mask does nothing: the items have no brand attribute",
    ]
    assert len(describe_variants([["x"]], config, ("Nike",))) == 1


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("Red Dress - Small", "Small, Red Dress"),
        ("Red Dress | Small", "Small, Red Dress"),
        ("Red Dress,Small", "Small, Red Dress"),
        ("Charger for Canon", "for Canon, Charger"),
        ("Speakers (Pair, Black), New", "New, Speakers (Pair, Black)"),
        ("V-neck tee 1,000 in-ear", "V-neck tee 1,000 in-ear"),  # no cut: no part of a word, no digits, no hyphen
        ("Plain words stay here", "Plain words stay here"),
    ],
)
def test_parts_change_places_and_words_keep_theirs(text: str, changed: str) -> None:
    assert first(text, shuffle=SURE) == changed


def test_a_preposition_is_joined_without_a_comma() -> None:
    orders = {first("Dress, Red with Lace", seed, shuffle=SURE) for seed in range(60)}
    assert orders == {
        "Dress with Lace, Red",
        "Red, Dress with Lace",
        "Red with Lace, Dress",
        "with Lace, Dress, Red",
        "with Lace, Red, Dress",
    }


def test_words_are_left_out_but_never_all() -> None:
    assert {first("Red Dress", seed, word_drop=SURE) for seed in range(20)} == {"Red", "Dress"}
    assert first("Red", word_drop=SURE) == "Red"
    # A lone sign is no word, so one of the two words must stay, and the sign goes with its end.
    assert {first("Red - Dress", seed, word_drop=SURE) for seed in range(20)} == {"Red", "Dress"}
    shares = [len(first("one two three four", seed, word_drop=0.25).split()) for seed in range(400)]
    assert sum(shares) / 400 == pytest.approx(3.0, abs=0.15)  # 4 words, a quarter left out


def test_an_altered_text_is_a_function_of_seed_and_text_alone() -> None:
    config = AugmentationConfig(synonyms=0.5, attributes=0.5, word_drop=0.2, shuffle=0.5)
    titles = ["Women's Red Cotton T-Shirt, Short Sleeve", "Black Leather Ankle Boots with Buckle", "Blue Jeans"]
    made = make_variants(titles, config, seed=3)
    assert make_variants(["New", *reversed(titles)], config, seed=3)[1:] == made[::-1]
    assert make_variants(titles, config, seed=4) != made
    # More of them only add to those that were there.
    more = make_variants(titles, config.model_copy(update={"variants": 8}), seed=3)
    assert [own[: len(few)] for own, few in zip(more, made, strict=True)] == made
    for title, own in zip(titles, made, strict=True):
        assert len({text_key(title), *map(text_key, own)}) == len(own) + 1  # no copy of the text, none of each other


PIECES = ["Red", "t-shirt", "tee", ",", "-", "|", "with", "(", ")", "Nike's", "&", "A&B", ";", "é"]


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES)).map(" ".join)), st.integers(0, 3))
def test_whatever_a_title_holds_no_altered_text_is_empty_or_a_copy(text: str, seed: int) -> None:
    config = AugmentationConfig(synonyms=0.5, attributes=0.5, word_drop=0.5, brand_mask=0.5, shuffle=0.5)
    (made,) = make_variants([text], config, brands=["Nike"], seed=seed)
    keys = [text_key(one) for one in made]
    assert len({*keys, text_key(text), ""}) == len(keys) + len({text_key(text), ""})
    assert make_variants([text], config, brands=["Nike"], seed=seed) == [made]


def test_with_everything_off_nothing_is_made() -> None:
    config = AugmentationConfig()
    assert not config.alters
    assert make_variants(["Red Dress", ""], config, seed=0) == [[], []]


def test_a_rewritten_text_is_the_first_and_the_start_of_every_second() -> None:
    asked: list[str] = []

    def backwards(texts: Sequence[str]) -> list[str]:
        asked.extend(texts)
        return [" ".join(reversed(text.split())) for text in texts]

    config = AugmentationConfig(variants=3, attributes=SURE)
    made = make_variants(["Navy Top", "Top", "Navy Top"], config, rewrite=backwards, seed=0)
    assert asked == ["Navy Top", "Top"]  # each distinct text once
    assert made[0] == made[2]
    assert made[0][0] == "Top Navy"
    assert made[0][1].endswith(" Top")
    assert made[0][2].startswith("Top ")
    assert made[1] == []  # backwards it is itself


def test_what_a_rewriting_function_does_wrong_is_told_with_its_name() -> None:
    def loses_one(texts: Sequence[str]) -> list[str]:
        return list(texts[1:])

    def breaks(texts: Sequence[str]) -> list[str]:
        raise RuntimeError("no model loaded")

    def numbers(texts: Sequence[str]) -> list[str]:
        return [7 for _ in texts]  # type: ignore[misc]

    config = AugmentationConfig()
    with pytest.raises(DataError, match="loses_one gave 1 texts for 2; expected one for each"):
        make_variants(["a", "b"], config, rewrite=loses_one, seed=0)
    with pytest.raises(DataError, match="breaks failed on a batch of 1 texts: RuntimeError: no model loaded"):
        make_variants(["a"], config, rewrite=breaks, seed=0)
    with pytest.raises(DataError, match='numbers gave 7 for "a"; expected a text'):
        make_variants(["a"], config, rewrite=numbers, seed=0)


def test_the_shipped_lexicon_has_no_fault_and_is_as_large_as_we_say() -> None:
    lexicon = read_lexicon(None)
    raw = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    assert len(raw["nouns"]) + len(raw["words"]) > 300
    assert len(raw["attributes"]) >= 8
    for phrase, others in lexicon.synonyms.items():
        for other in others:
            (found,) = lexicon.find(other)
            assert (found.start, found.stop) == (0, len(other))
            assert "".join(phrase) in {back.casefold().replace("-", "").replace(" ", "") for back in found.synonyms}


def test_names_of_one_wordnet_synset_stand_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is the most frequent sense of both, and one of things that are sold."""
    (tmp_path / "index.noun").write_text(
        "  1 This software and database is being provided to you\n"
        "couch n 2 2 @ ~ 2 1 00000100 00000200  \n"
        "davenport n 2 1 @ 2 0 00000300 00000100  \n"
        "dog n 1 1 @ 1 1 00000400  \n"
        "hound n 1 1 @ 1 0 00000400  \n"
        "sneaker n 1 1 @ 1 0 00000500  \n"
        "plimsoll n 1 1 @ 1 0 00000500  \n"
        "sofa n 1 1 @ 1 1 00000100  \n"
    )
    (tmp_path / "data.noun").write_text(
        "  1 This software and database is being provided to you\n"
        "00000100 06 n 04 sofa 0 couch 0 davenport 1 Chesterfield 0 001 @ 00000900 n 0000 | an upholstered seat  \n"
        "00000200 06 n 01 couch 1 000 | a coat of paint  \n"
        "00000400 05 n 02 dog 0 hound 0 000 | a member of the genus Canis  \n"
        "00000500 06 n 02 sneaker 0 plimsoll 0 000 | a canvas shoe  \n"
    )
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    assert read_wordnet() == [["sofa", "couch"], ["sneaker", "plimsoll"]]
    (tmp_path / "data.noun").write_text("not a database\n")
    with pytest.raises(DataError, match="holds no WordNet 3 database"):
        read_wordnet()


def test_wordnet_adds_to_the_shipped_lexicon_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lexicon_module, "read_wordnet", lambda: [["sneaker", "gutty"], ["samovar", "tea urn"]])
    shipped, wider = read_lexicon(None), read_lexicon("wordnet")
    assert wider.synonyms.items() >= shipped.synonyms.items()
    assert [match.synonyms for match in wider.find("two samovars, one gutty")] == [("tea urns",)]


def test_a_missing_wordnet_is_told_with_what_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wordnet, "_USUAL", ())
    monkeypatch.setenv("WNHOME", str(tmp_path))
    with pytest.raises(DataError, match="apt install wordnet-base"):
        read_lexicon("wordnet")


def test_all_faults_of_a_lexicon_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "faulty.yaml"
    file.write_text(
        "noun: [[a, b]]\nnouns:\n  - [couch]\n  - [sofa, settee]\n  - [sofa, divan]\n  - bed\n"
        "attributes:\n  colour: [red, 'dark, red']\n  size: [[1], no]\nkeep: [settee]\nwords: 3\n"
    )
    with pytest.raises(DataError) as caught:
        read_lexicon(str(file))
    assert [str(fault) for fault in caught.value.faults] == [
        'noun: unknown key. Did you mean "nouns"?',
        "nouns[0]: expected two phrases or more, found 1.",
        'nouns[2]: "sofa" stands in nouns[1] already. Keep one of them.',
        'nouns[2]: "sofas" stands in nouns[1] already. Keep one of them.',
        'nouns[3]: expected a list of phrases, found "bed". Write [couch, sofa].',
        'words: expected a list of groups, found "3". Write - [couch, sofa].',
        'attributes.colour[1]: "dark, red" can be found in no text. '
        "Write words of letters and digits with one space or hyphen between them.",
        "attributes.size[0]: expected a phrase, found a list.",
        'keep[0]: "settee" stands in nouns[1] already. Keep one of them.',
    ]


@pytest.mark.parametrize(
    ("content", "told_so"),
    [
        (b"nouns: [[a, b]", "not valid YAML in line"),
        (b"\xff\xfe", "expected UTF-8, found the byte 0xff"),
        (b"- a", "expected keys"),
        (b"", "expected keys"),
        (b"nouns: []", "is empty; expected any of nouns, words, attributes, keep"),
        (b"[" * 2000, "not valid YAML"),
        (b"nouns: &a [*a]", "not valid YAML|expected"),
    ],
)
def test_a_file_that_is_no_lexicon_is_refused(tmp_path: Path, content: bytes, told_so: str) -> None:
    file = tmp_path / "no.yaml"
    file.write_bytes(content)
    with pytest.raises(DataError, match=told_so):
        read_lexicon(str(file))
    with pytest.raises(DataError, match="No such file"):
        read_lexicon(str(tmp_path / "absent.yaml"))


def test_words_of_yaml_are_words(tmp_path: Path) -> None:
    file = tmp_path / "on.yaml"
    file.write_text("words:\n  - [on, off]\n  - [no, none]\n")
    config = AugmentationConfig(variants=1, synonyms=SURE, lexicon=str(file))
    assert make_variants(["no light on"], config, seed=0) == [["none light off"]]


def test_chances_are_below_one() -> None:
    with pytest.raises(ValidationError):
        AugmentationConfig(word_drop=1.0)
    with pytest.raises(ValidationError):
        AugmentationConfig(variants=33)
