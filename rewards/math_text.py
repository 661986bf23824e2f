r"""Mathematics as people and models write it, into tokens: `2\frac{1}{2}\text{ cm}` is `2 \frac { 1 } { 2 } cm`.

A token is a number, a command such as `\frac`, one letter, a word, or a sign. Two numbers side by side stood apart in
the text: `2 2/3` has four tokens, `22/3` three.
"""
# ruff: noqa: RUF001, SIM905

from __future__ import annotations

import re
import unicodedata

CURRENCIES = {"¤": "$", "€": "€", "£": "£", "¥": "¥", "₹": "₹"}  # ¤ stands for the dollar of `\$5`
SIGNS = dict(
    pair.split(" ", 1)
    for pair in (
        r"− -,– -,— -,× \cdot ,· \cdot ,⋅ \cdot ,∗ \cdot ,÷ /,∕ /,⁄ /,√ \sqrt ,∛ \sqrt[3] ,∞ \infty ,≤ \le ,≥ \ge ,"
        r"⩽ \le ,⩾ \ge ,≠ \neq ,∈ \in ,∪ \cup ,∩ \cap ,± \pm ,≈ \approx ,∅ \emptyset ,ℝ \mathbb{R},º °,… \ldots ,"
        "′ ',’ ',∶ :"
    ).split(",")
)
SMALL = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ₀₁₂₃₄₅₆₇₈₉", "0123456789+-n0123456789")
SAME = {  # other ways to write a token
    r"\leq": r"\le", r"\leqslant": r"\le", "<=": r"\le", r"\geq": r"\ge", r"\geqslant": r"\ge", ">=": r"\ge",
    r"\ne": r"\neq", "!=": r"\neq", "==": "=", r"\lt": "<", r"\gt": ">", r"\times": "*", r"\cdot": "*", "**": "^",
    r"\div": "/", r"\dots": r"\ldots", r"\cdots": r"\ldots", "...": r"\ldots", r"\lbrace": r"\{", r"\rbrace": r"\}",
    r"\vert": "|", r"\lvert": "|", r"\rvert": "|", r"\mid": "|", r"\varnothing": r"\emptyset", r"\land": "and",
    r"\wedge": "and", r"\lor": "or", r"\vee": "or", "pi": r"\pi", "infinity": r"\infty", "infty": r"\infty",
    "°": r"\deg", r"\degree": r"\deg", r"\%": "%", r"\varphi": r"\phi", r"\simeq": r"\approx", r"\colon": ":",
}  # fmt: skip
FUNCTIONS = r"\sin \cos \tan \cot \sec \csc \arcsin \arccos \arctan \ln \log \exp \sqrt".split()
SAME |= {name[1:]: name for name in FUNCTIONS}
UNITS = {  # every name of a unit -> its first name here; a plural `s` is cut off before
    word: names.split()[0]
    for names in (
        r"\deg degree deg,% percent pct,$ dollar usd buck,¢ cent,€ euro eur,£ gbp,mm millimeter,m meter metre,mile mi,"
        "cm centimeter centimetre,km kilometer kilometre,inch inche in,foot feet ft,yard yd,mg milligram,g gram,/ per,"
        "kg kilogram,lb pound,oz ounce,ml milliliter millilitre,l liter litre,second sec,minute min,hour hr h,of,"
        "am,pm,year yr,hertz hz,mph,kph kmh,c celsius,f fahrenheit,j joule,n newton,w watt,kw kilowatt,gb gigabyte"
    ).split(",")
    for word in names.split()
}
LETTER_UNITS = dict(m="meter", g="gram", s="sec", h="hour", L="liter", N="newton", J="joule", W="watt")
POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
NO_UNITS = set(
    "and or to mod modulo if when times plus minus divided over choose base less more than squared cubed factorial "
    "is for not half with between from equal at but no".split()
)
TOKEN = re.compile(r"(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?|\\?[A-Za-z]+|\\.|\.\.\.|\*\*|[<>!=]=|\S")
SPACING = re.compile(
    r"\\(?:left|right|displaystyle|limits|[bB]igg?[lr]?|q?quad)(?![A-Za-z])|(?<!\\)\\[,;: >()\[\]]|[~\u00a0\u2009]"
)
WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|normal)?|mbox|math(?:rm|bf|it|sf)|boldsymbol|operatorname)\*?\s*\{([^{}]*)\}"
)
GROUPED = re.compile(r"(?<=\d)(?:,?\\!|\{,\}|\\,|'|[\u00a0\u2009\u202f])\s*(?=\d{3}(?!\d))")
COMMAS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
DOTS = re.compile(r"(?<![\d.,])\d{1,3}(?:\.\d{3}){2,}(?![\d.])")
ORDINAL = re.compile(r"(?<=\d)\s*(?:\^\s*\{\s*(?:st|nd|rd|th)\s*\}|\^?(?:st|nd|rd|th)(?![A-Za-z]))")
REPEATING = re.compile(r"(\d{0,20})\.(\d{0,20})\\overline\s*\{(\d{1,20})\}")
CLAUSE = re.compile(
    r"(?<=\S)\s*[,;(-]?\s*\b(?:since|because|so|hence|thus|therefore|where|which|as|while|i\.e\.)\s.*$", re.S | re.I
)
HEDGE = re.compile(r"(?:(?:\\approx|\\sim|approximately|about|roughly|exactly|only|just)(?![a-z])|[≈~=:*])\s*")
REWRITES = [  # in this order
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\(frac|binom)\s*(\d)"), r"\\\1{\2}"),  # \frac12
    (re.compile(r"(\\(?:frac|binom)\s*\{[^{}]*\})\s*(\d)"), r"\1{\2}"),
    (ORDINAL, ""),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))"), "°"),
    (re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)"), "*"),
    (re.compile(r"\b([ap])\s*\.\s*m\b\.?"), r"\1m"),
    (re.compile(r"(?<=\d)\{,\}(?=\d)"), "."),
    (CLAUSE, ""),
]


def normalise(text: str) -> str:
    r"""`text` without what carries no value: math delimiters, spacing, text wrappers, a clause that explains.

    Thousands are joined where they are marked: `1,000`, `1{,}000`, `1\,000`, `1'000`, `1.000.000`. A plain space or a
    comma with a space parts two numbers. Inside brackets `(1,234)` a comma parts too.
    """
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", lambda run: "^{" + run.group().translate(SMALL) + "}", text)
        text = re.sub("[₀-₉]+", lambda run: "_{" + run.group().translate(SMALL) + "}", text)
        text = "".join(sign if sign.isascii() else _ascii(sign) for sign in GROUPED.sub("", text))
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # escaped once too often
    text = re.sub(r"\\\$|\$(?=\d[^$]*$)", "¤", text.strip(" \t\r\n*")).replace("$", "")
    text = REPEATING.sub(_repeating, GROUPED.sub("", text)).replace(r"\!", "")
    for _ in range(3):  # nested ones
        text = WRAPPER.sub(r" \1 ", text)
    text = SPACING.sub(" ", text)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    text = re.sub(r"(?<=[\d}])\s+([mgshLNJW])(?=\s*(?:[/^].*)?$)", lambda unit: f" {LETTER_UNITS[unit[1]]} ", text)
    if not re.search(r"[(\[]|\\\{", text):
        text = COMMAS.sub(lambda number: number.group().replace(",", ""), text)
    text = DOTS.sub(lambda number: number.group().replace(".", ""), text)
    return re.sub(r"[\s.,;:*\u3002]+$", "", re.sub(rf"^\s*(?:{HEDGE.pattern})?", "", text)).strip()


def tokenise(text: str) -> tuple[str, ...]:
    """The tokens of a text that `normalise` gave."""
    tokens: list[str] = []
    for found in TOKEN.finditer(text):
        token = SAME.get(found.group(), found.group())
        if is_word(token):
            attached = re.match(r"[\d})]", text[found.start() - 1 : found.start()])
            known = token.lower() in NO_UNITS | POWERS.keys() or unit_name((token,)) in UNITS.values()
            tokens += [token] if known or (len(token) > 2 and not attached) else list(token)
        else:
            tokens.append(token)
    return tuple(tokens)


def is_word(token: str) -> bool:
    """True for `apples`; False for the letter `x`, a number, a command."""
    return len(token) > 1 and token.isalpha()


def split_unit(tokens: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    r"""The value and the name of its unit: `("12", "square", "cm")` -> `("12",)`, `"cm^2"`.

    Currency, per cent, degrees, a number base (`_8`) and any words after a number are units. "" without one.
    """
    unit = next((CURRENCIES[token] for token in (*tokens[:2], *tokens[-1:]) if token in CURRENCIES), "")
    tokens = tuple(token for token in tokens if token not in CURRENCIES)
    digits = tokens[tokens[:1] == ("-",) :]
    if digits[1:2] == ("_",) and digits[0].isdigit():
        return tokens[: -len(digits) + 1], "".join(token for token in digits[1:] if token not in "{}")
    start = next((at for at, token in enumerate(tokens) if at and (is_word(token) or token in (r"\deg", "%"))), None)
    if start is None or not any(token[-1].isdigit() or token[0] == "\\" for token in tokens[:start]):
        return tokens, unit
    value, tail = tokens[:start], tokens[start:]
    if tail[0].lower() in SCALES:
        value, tail = (*value, "*", str(SCALES[tail[0].lower()])), tail[1:]
    if not re.fullmatch(r"(?:[A-Za-z]+|[-/.*%]|\\deg|\^ (?:\{ )?-? ?\d(?: \})?| )*", " ".join(tail)):
        return tokens, unit
    if tail and (tail[0].lower() in NO_UNITS or (tail[0] == r"\deg" and set(value) & set(FUNCTIONS))):
        return tokens, unit
    variables = any(len(token) == 1 and token.isalpha() for token in value)
    if tail and variables and unit_name(tail[:1]) not in UNITS.values():
        return tokens, unit
    return value, unit or unit_name(tail)


def unit_name(tail: tuple[str, ...]) -> str:
    """One name for the ways to write a unit: `square centimeters` and `cm^2` are `cm^2`; "units" are none."""
    names = []
    for word in tail:
        lower = word.lower() if len(word) > 1 else word
        singular = lower.removesuffix("s") if len(lower) > 2 else lower
        names.append(UNITS.get(lower) or UNITS.get(singular) or singular)
    power = POWERS.get(names[0], "") if names else ""
    text = " ".join(name for name in names[power != "" :] if name not in "{}.").replace(" ^ ", "^") + power
    return "" if "unit" in names else text


def _ascii(sign: str) -> str:
    """An ASCII spelling of one sign; fractions become LaTeX, what has none stays."""
    if sign in SIGNS:
        return SIGNS[sign]
    if "\u03b1" <= sign <= "\u03c9":
        return "\\" + unicodedata.name(sign).rpartition(" ")[2].lower().replace("lamda", "lambda") + " "
    top, slash, bottom = unicodedata.normalize("NFKC", sign).partition("\u2044")
    return rf" \frac{{{top}}}{{{bottom}}}" if slash and bottom else top


def _repeating(number: re.Match[str]) -> str:
    whole, fixed, period = number.groups()
    top = int(whole + fixed + period) - int(whole + fixed or "0")
    return rf"\frac{{{top}}}{{{10 ** len(fixed) * (10 ** len(period) - 1)}}}"
