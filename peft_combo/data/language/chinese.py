"""Chinese: characters folded, promotion left out, words found, budgets in digits or characters, and fashion nouns.

Owns the lists. Words are found by jieba and traditional characters read as simplified ones by OpenCC (the extra
[chinese]); without them pairs of characters stand for words, and traditional characters stay. Neither is imported
before a Chinese text is read.
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

from peft_combo.data.language.budget import Budget
from peft_combo.data.language.chinese_words import ATTRIBUTES, FASHION, PROMOTION
from peft_combo.data.language.fallback import split_pairs
from peft_combo.data.language.scripts import HAN_RANGES

# --- lists ------------------------------------------------------------------------------------------------------------

_PROMOTION = re.compile(
    r"(?:(?:20)\d\d\s*年?\s*(?:早?[春夏秋冬]{1,2}季?)?\s*(?:新款|新品|爆款|款)|(?:20)\d\d\s*年|"
    + "|".join(sorted(map(re.escape, set(PROMOTION.split())), key=lambda word: (-len(word), word)))
    + r")",
    re.IGNORECASE,
)

_UNITS = {
    "毫升": "ml", "升": "l", "毫克": "mg", "公斤": "kg", "千克": "kg", "克": "g",
    "厘米": "cm", "公分": "cm", "毫米": "mm",
    "英寸": "inch", "寸": "inch", "瓦": "w", "毫安": "mah",
}  # fmt: skip
_UNIT = re.compile(r"(?<=\d)\s*(" + "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True)) + ")")
_COUNTED = "件条双套只个盒包袋瓶支片张本对副款色"
_DIGITS = {**{c: n for n, c in enumerate("零一二三四五六七八九")}, "〇": 0, "两": 2, "俩": 2, "壹": 1, "贰": 2, "叁": 3,
           "肆": 4, "伍": 5, "陆": 6, "柒": 7, "捌": 8, "玖": 9}  # fmt: skip
_POWERS = {"十": 10, "百": 100, "千": 1000, "拾": 10, "佰": 100, "仟": 1000}
_NUMERAL = "".join(_DIGITS) + "".join(_POWERS) + "万"
_COUNT = re.compile(f"([{_NUMERAL}]+)(?=[{_COUNTED}]装?)")

# Groups of names for one thing; the first stands for all where nouns are compared.
_SYNONYMS = (
    ("连衣裙", "连身裙"), ("半身裙", "半裙"), ("衬衫", "衬衣"), ("墨镜", "太阳镜", "太阳眼镜"), ("皮带", "腰带"),
    ("双肩包", "背包", "书包"), ("跑步鞋", "跑鞋"), ("手表", "腕表"), ("西装", "西服"), ("包", "包包"), ("鞋", "鞋子"),
    ("裙", "裙子"), ("裤", "裤子"), ("帽", "帽子"), ("靴", "靴子"),
    ("毛线帽", "针织帽"), ("大衣", "呢大衣", "毛呢大衣"),
)  # fmt: skip
_HEAD = {name: group[0] for group in _SYNONYMS for name in group}

# --- words ------------------------------------------------------------------------------------------------------------

_DIMINUTIVE = re.compile("([裤裙鞋帽靴袜])子")  # 裙子 is 裙
_HAN_RUN = re.compile(f"[{HAN_RANGES}]+")
_SPLIT = re.compile(f"[{HAN_RANGES}]+|[^{HAN_RANGES}]+")


def has_words() -> bool:
    """Say whether words can be found: the extra [chinese] is installed."""
    return importlib.util.find_spec("jieba") is not None


def fold(text: str) -> str:
    """Return a text in lower case with full-width letters at half width and traditional characters simplified."""
    folded = unicodedata.normalize("NFKC", text).lower()
    simplify = _load_simplifier()
    return folded if simplify is None else simplify(folded)


def drop_promotion(text: str) -> str:
    """Return a text without the words that sell and do not tell; a text of nothing else stays."""
    left = _PROMOTION.sub(" ", text)
    return left if re.search(r"\w", left) else text


def split_words(text: str) -> str:
    """Return the words of a Chinese text with spaces between them; see `peft_combo.data.language.split_words`."""
    told = drop_promotion(fold(text))
    told = _UNIT.sub(lambda unit: _UNITS[unit.group(1)], told)
    told = _COUNT.sub(lambda count: f"{parse_number(count.group(1)) or 0:g}", told)
    told = _DIMINUTIVE.sub(r"\1", told)
    cut = _load_cutter()
    parts = [cut(part) if _HAN_RUN.match(part) else part for part in _SPLIT.findall(told)]
    return " ".join(" ".join(parts).split())


@cache
def _load_cutter() -> Callable[[str], str]:
    """Return what puts spaces between words: jieba's tokenizer, with our lists among its words, or pairs without it."""
    if not has_words():
        return split_pairs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for pkg_resources, and has escapes that Python warns of
        import jieba

        tokenizer: Any = jieba.Tokenizer()
        # As `initialize` does, but for the cache in the folder of temporary files and the lines on stderr.
        with tokenizer.get_dict_file() as dictionary:
            tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(dictionary)
        tokenizer.initialized = True
        for word in [*ATTRIBUTES.split(), *(name for names in FASHION.values() for name in names)]:
            if len(word) > 1:
                tokenizer.add_word(word.lower(), freq=20_000)
    return lambda run: " ".join(tokenizer.cut(run))


@cache
def _load_simplifier() -> Callable[[str], str] | None:
    if importlib.util.find_spec("opencc") is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import opencc

        converter: Any = opencc.OpenCC("t2s")
    return lambda text: str(converter.convert(text))


# --- numbers and budgets ----------------------------------------------------------------------------------------------


def parse_number(text: str) -> float | None:
    """Read a number in digits, characters or both: 500, 1.5万, 三百五 (350), 一千二百, 两千; None for what is none."""
    text = text.replace(",", "").replace("，", "").strip().lower()
    digits = re.fullmatch(r"(\d+(?:\.\d+)?)([百千万kw]?)", text)
    if digits:
        power = {"": 1, "百": 100, "千": 1000, "k": 1000, "万": 10_000, "w": 10_000}[digits[2]]
        return float(digits[1]) * power
    if not text or any(char not in _NUMERAL for char in text):
        return None
    high, _, low = text.rpartition("万")
    if high:
        above = _parse_below(high)
        # 一万五 is 15,000: a last digit alone counts the next power down.
        below = 1000.0 * _DIGITS[low] if len(low) == 1 and low in _DIGITS else _parse_below(low)
        return None if above is None or below is None else above * 10_000 + below
    return _parse_below(text)


def _parse_below(text: str) -> float | None:
    """Read characters below 万."""
    if all(char in _DIGITS for char in text):
        return float("".join(str(_DIGITS[char]) for char in text) or 0)
    total, digit, power = 0, None, 0
    for char in text:
        if char in _POWERS:
            power = _POWERS[char]
            total += (1 if digit is None else digit) * power
            digit = None
        elif char in _DIGITS:
            digit = _DIGITS[char]
            if digit == 0:
                power = 10
                digit = None
        else:
            return None
    return float(total + (0 if digit is None else digit * (power // 10 or 1)))


_AMOUNT = rf"(?P<{{}}>\d[\d,]*(?:\.\d+)?\s*[百千万kKwW]?|[{_NUMERAL}]+)"
_MONEY = r"(?:元|块钱|块|圆|刀|美元|美金|欧元|人民币|rmb|RMB)"
_END = r"(?=\s*(?:$|[,，。;；、!！?？的地得和与配加内预总]|[^\w\s]|\s))"
_BUDGET = re.compile(
    # 预算500元以内, 预算三百左右, 预算不超过 800
    rf"[,，;；、(（]?\s*(?:总?预算|总价|价格|价位|一共|总共)\s*(?:是|为|在|大概|大约|约)?\s*(?:不超过|不到|不高于|低于|最多|至多|小于)?\s*"
    rf"[¥￥$€£]?\s*{_AMOUNT.format('a')}\s*{_MONEY}?\s*(?:以内|以下|之内|之下|内|左右|上下|封顶)?[)）]?"
    # 不超过五百块, 低于 300 元
    rf"|[,，;；、(（]?\s*(?:不超过|不高于|不要超过|别超过|低于|最多|至多|小于)\s*[¥￥$€£]?\s*{_AMOUNT.format('b')}\s*{_MONEY}?"
    rf"(?:以内|以下)?[)）]?{_END}"
    # 三百块以下, 500元以内, 300以内
    rf"|[,，;；、(（]?\s*[¥￥$€£]?\s*{_AMOUNT.format('c')}\s*{_MONEY}?\s*(?:以内|以下|之内|之下|封顶)[)）]?"
)


def find_budget(query: str) -> Budget | None:
    """Find 预算500元以内, 三百块以下, 不超过 1.5万 and their like."""
    for found in _BUDGET.finditer(unicodedata.normalize("NFKC", query) if _keeps_length(query) else query):
        amount = parse_number(re.sub(r"\s", "", found["a"] or found["b"] or found["c"]))
        if amount is not None and amount > 0:
            return Budget(amount, found.start(), found.end())
    return None


def _keeps_length(query: str) -> bool:
    return len(unicodedata.normalize("NFKC", query)) == len(query)


# --- queries ----------------------------------------------------------------------------------------------------------

# What begins the next thing of a query.
NEXT = (
    r"\s*(?:搭配|配上|加上|外加|以及|还有|还要|另外|再来|再配|或者|[、，；。配和与及跟再带])"
    r"\s*(?:一?[件条双套只个顶款副对])?"
)


def is_same_noun(name: str, other: str) -> bool:
    """Say whether one name is the other with words before it, synonyms being one: 高跟鞋 and 鞋, 连身裙 and 连衣裙."""
    one, two = (_HEAD.get(folded, folded) for folded in (fold(name).replace(" ", ""), fold(other).replace(" ", "")))
    return bool(one and two) and (one.endswith(two) or two.endswith(one))
