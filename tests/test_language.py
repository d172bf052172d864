"""Languages: words, folding, budgets and names, in English, Chinese and scripts without spaces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY

from peft_combo.data.augmentation.lexicon import read_lexicon
from peft_combo.data.labels.tags import noun_entities, words_of
from peft_combo.data.language import chinese, count_unspaced, detect_language, find_budget, is_same_noun, split_words
from peft_combo.data.model import Catalog
from peft_combo.encoder.heads.tagging import continue_tag, find_first_pieces, find_joined
from peft_combo.recommender.query import parse_query
from peft_combo.recommender.text_ranking.views import TextViews
from peft_combo.scoring.text import tfidf_vectors

needs_jieba = pytest.mark.skipif(not chinese.has_words(), reason="the extra [chinese] is not installed")


@pytest.fixture
def no_extra(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As without the extra [chinese]."""
    monkeypatch.setattr(chinese, "has_words", lambda: False)
    monkeypatch.setattr(chinese, "_load_simplifier", lambda: None)
    chinese._load_cutter.cache_clear()
    split_words.cache_clear()
    yield
    chinese._load_cutter.cache_clear()
    split_words.cache_clear()


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Red dress, 100% cotton", "english"), ("Été à la plage", "english"), ("红色连衣裙 NIKE", "chinese"),
        ("赤いドレス", "other"), ("ชุดเดรส", "other"), ("", "english"),
    ],
)  # fmt: skip
def test_a_language_is_told_by_the_script(text: str, language: str) -> None:
    assert detect_language(text) == language


@needs_jieba
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "2024新款韩版宽松显瘦高腰阔腿裤女夏季薄款冰丝垂感休闲裤子包邮",
            "韩版 宽松 显瘦 高腰 阔腿裤 女 夏季 薄款 冰丝 垂感 休闲裤",
        ),
        ("小香风针织开衫外套女 包邮 正品", "小香风 针织开衫 外套 女"),
        ("ＮＩＫＥ运动鞋 500毫升 两件套", "nike 运动鞋 500ml 2 件套"),
        ("包邮", "包邮"),  # of nothing else something stays
    ],
)
def test_chinese_words_are_found_and_promotion_goes(text: str, words: str) -> None:
    assert split_words(text) == words


def test_traditional_characters_are_read_as_simplified_ones() -> None:
    pytest.importorskip("opencc", reason="the extra [chinese] is not installed")
    assert chinese.fold("紅色連衣裙 頭髮") == "红色连衣裙 头发"
    assert split_words("紅色連衣裙") == split_words("红色连衣裙")


def test_without_the_extra_pairs_of_characters_stand_for_words(no_extra: None) -> None:
    assert split_words("红色连衣裙 女") == "红色 色连 连衣 衣裙 女"


def test_other_scripts_are_read_by_pairs_and_english_as_it_is() -> None:
    assert split_words("赤いドレス Ｌ") == "赤い いド ドレ レス l"
    assert split_words("Women's T-shirt, Ａ") == "Women's T-shirt, Ａ"
    assert split_words("红色连衣裙", "english") == "红色连衣裙"
    assert split_words("ab", "other") == "ab"
    assert count_unspaced(["红色", "red", "赤い"]) == 2
    assert count_unspaced(["红色", "red"], "english") == 0


def test_titles_that_share_a_chinese_word_are_alike() -> None:
    texts = ["红色连衣裙女", "白色连衣裙长款", "黑色西装裤男"]
    plain = tfidf_vectors(texts)
    assert (plain @ plain.T).toarray()[0, 1] == 0  # a whole clause is one token
    words = tfidf_vectors([split_words(text) for text in texts])
    alike = (words @ words.T).toarray()
    assert alike[0, 1] > alike[0, 2] == 0


def test_a_catalogue_of_chinese_titles_has_text_views() -> None:
    texts = ["红色连衣裙女", "白色连衣裙长款", "黑色西装裤男", "黑色皮鞋男"]
    views = TextViews.of(Catalog.build([str(n) for n in range(4)], texts), "{title}", None)
    alike = views.compare(np.array([0]), np.array([1, 2, 3]))
    for name in ("words", "word pieces", "BM25"):
        assert alike[name][0, 0] > max(alike[name][0, 1:]), name


def test_jieba_is_not_loaded_before_a_chinese_text_is_read_and_says_nothing(tmp_path: Path) -> None:
    program = (
        "import sys, peft_combo.cli\n"
        "from peft_combo.data.language import split_words\n"
        "split_words('red dress')\n"
        "assert not {'jieba', 'opencc'} & set(sys.modules)\n"
        "print(split_words('红色连衣裙'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True, encoding="utf-8",
        env={"PATH": "", "TMPDIR": str(tmp_path), "PYTHONUTF8": "1"},
    )  # fmt: skip
    assert done.stderr == ""
    assert "连衣" in done.stdout
    assert list(tmp_path.iterdir()) == []  # and leaves no cache there


# --- queries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "amount", "left"),
    [
        ("红色连衣裙配高跟鞋，预算500元以内", 500, "红色连衣裙配高跟鞋"), ("三百块以下的运动鞋", 300, "的运动鞋"),
        ("连衣裙和包包 不超过五百", 500, "连衣裙和包包"), ("预算一千二 牛仔裤", 1200, "牛仔裤"),
        ("预算1.5万的手表", 15000, "的手表"), ("５００元以内的包", 500, "的包"), ("500以内 衬衫", 500, "衬衫"),
        ("dress under $50", 50, "dress"), ("dress within 300 yuan", 300, "dress"),
        ("白衬衫 100%纯棉", None, "白衬衫 100%纯棉"), ("一件T恤两双鞋", None, "一件T恤两双鞋"),
        ("42码皮鞋", None, "42码皮鞋"),
    ],
)  # fmt: skip
def test_a_budget_is_found_in_both_languages(query: str, amount: float | None, left: str) -> None:
    found = find_budget(query)
    assert (None if found is None else found.amount) == amount
    assert left == (query if found is None else (query[: found.start] + query[found.stop :]).strip())


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("三百五", 350), ("一千二", 1200), ("一万五", 15000), ("两千五百", 2500), ("三百零五", 305), ("十五", 15),
        ("二十", 20), ("1.5万", 15000), ("2k", 2000), ("二零二四", 2024), ("1,200", 1200), ("裙", None), ("", None),
    ],
)  # fmt: skip
def test_numbers_in_characters(text: str, number: float | None) -> None:
    assert chinese.parse_number(text) == number


def test_a_chinese_query_is_taken_apart() -> None:
    found = parse_query("黑色皮质短靴配一件羊毛大衣，再来顶渔夫帽，预算一千元以内", noun_entities)
    assert [(item.name, item.type, item.text) for item in found.items] == [
        ("短靴", "Shoe", "黑色皮质短靴"), ("大衣", "Clo", "羊毛大衣"), ("渔夫帽", "Acc", "渔夫帽"),
    ]  # fmt: skip
    assert found.budget == 1000


def test_names_of_one_noun() -> None:
    assert is_same_noun("高跟鞋", "鞋子")
    assert is_same_noun("连身裙", "连衣裙")
    assert is_same_noun("ankle boots", "a boot")
    assert not is_same_noun("高跟鞋", "手提包")
    assert not is_same_noun("boots", "靴子")


# --- tags and synonyms ------------------------------------------------------------------------------------------------


def test_names_are_found_in_chinese_titles() -> None:
    (found,) = noun_entities(["复古Vans帆布鞋女 T恤配A字裙"])
    assert [(one.type, one.text) for one in found] == [("Shoe", "帆布鞋"), ("Clo", "T恤"), ("Clo", "A字裙")]


def test_characters_within_one_piece_go_on_with_the_first() -> None:
    words = words_of("新连衣裙 x")
    assert words == ((0, 1), (1, 2), (2, 3), (3, 4), (5, 6))
    pieces = [(0, 0), (0, 1), (1, 4), (4, 6), (0, 0)]  # the last piece begins with the space, as SentencePiece has it
    assert find_first_pieces(words, pieces).tolist() == [1, 2, -1, -1, 3]
    assert find_joined(words, pieces).tolist() == [False, False, True, True, False]
    assert [continue_tag(tag) for tag in ("B-Clo", "I-Clo", "O")] == ["I-Clo", "I-Clo", "O"]


def test_the_shipped_lexicon_knows_chinese_synonyms() -> None:
    (match,) = (one for one in read_lexicon(None).find("夏季连衣裙") if one.synonyms)
    assert (match.start, match.stop, match.synonyms) == (2, 5, ("连身裙",))
