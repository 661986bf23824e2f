r"""Values of mathematical expressions, in bounded time.

Expressions are compared by what they are worth, not by rewriting them. Whole numbers and fractions stay exact. Where a
root or a function makes a number irrational, it has 4096 bits and lies between 2^-1024 and 2^1024, so that
`10^{20}\sqrt2` and `10^{20}\sqrt2+1` differ. Variables take fixed pseudo-random values; expressions that agree at three
such points are equal.
"""
# ruff: noqa: SIM905

from __future__ import annotations

import functools
import math
import random
import threading
from fractions import Fraction
from typing import Any

import mpmath

MAX_BITS = 2**16  # of one exact number
MAX_WORK = 2**20  # bits of all results on the way, 512 for an irrational one
BITS, MAX_MAGNITUDE = 4096, 1024  # of an irrational number; its binary exponent is at most +-MAX_MAGNITUDE
ERROR = mpmath.ldexp(1, MAX_MAGNITUDE + 64 - BITS)  # what rounding may leave between two equal numbers
MAX_DEPTH = 40
CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|"}
FUNCTIONS = {"ln": "ln", "lg": "ln", "log": "ln", "arcsin": "asin", "arccos": "acos", "arctan": "atan"}
FUNCTIONS |= {name: name for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "exp")}
NO_FACTOR = set(
    r"""+ - * / ) ] } | \} ! ^ , _ & \\ = < > : ; ' % ? # " @ ~ ` . \deg \pm \mp \ldots \int \lim""".split()
)
NO_FACTOR |= set(r"\overline \begin \end \cup \cap \in \le \ge \neq \approx \setminus \to \sum \prod \forall".split())
NO_FACTOR |= set(r"\lfloor \rfloor \lceil \rceil \gcd \max \min \det \partial".split())
Number = Any  # Fraction, or mpmath's mpf or mpc
CONTEXT = mpmath.MPContext()
CONTEXT.prec = BITS
CONSTANTS: dict[str, Number] = {"e": +CONTEXT.e, "i": CONTEXT.mpc(0, 1), r"\pi": +CONTEXT.pi}
_lock = threading.Lock()  # functions of mpmath change its precision while they run


class UnreadableError(ValueError):
    """The tokens are no expression with a value, or computing it would take too long."""


class Expression:
    """An expression read at one point: each method consumes tokens and returns their value.

    Args:
        tokens: the expression.
        point: which of the three points gives variables their values.

    Attributes:
        names: the variables met.
        result: the value of all the tokens, or the error that says why there is none.
    """

    def __init__(self, tokens: tuple[str, ...], point: int) -> None:
        self.tokens, self.point = tokens, point
        self.at = self.depth = self.bars = self.work = 0
        self.names: set[str] = set()
        try:
            self.result: Number = self.sum()
            if self.next:
                raise UnreadableError(f"'{self.next}' is not expected here")
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            self.result = UnreadableError(str(error))

    def sum(self) -> Number:
        sign = self.sign()
        total = self.multiply(sign, self.product())
        while self.next in ("+", "-"):
            total = self.add(total, self.multiply(self.sign(), self.product()))
        return total

    def sign(self) -> Fraction:
        self.take("+")
        return Fraction(-1 if self.take("-") else 1)

    def product(self) -> Number:
        result = self.factor()
        while True:
            if self.take("/"):
                result = self.multiply(result, self.inverse(self.factor()))
            elif self.take("*") or self.starts_factor():
                result = self.multiply(result, self.factor())
            else:
                return result

    def factor(self) -> Number:
        if self.take("-"):
            return self.multiply(Fraction(-1), self.factor())
        result = self.atom()
        while self.next in ("!", "^", r"\deg"):
            sign = self.pop()
            if sign == "^":
                result = self.power(result, self.exponent())
            elif sign == "!":
                result = self.factorial(result)
            else:
                result = self.multiply(result, self.multiply(CONSTANTS[r"\pi"], Fraction(1, 180)))
        return result

    def exponent(self) -> Number:
        sign, exponent = self.sign(), self.atom()
        return self.multiply(sign, self.power(exponent, self.exponent()) if self.take("^") else exponent)

    def atom(self) -> Number:
        token = self.pop()
        if token[0].isdigit() or token[0] == "." != token:
            return self.number(token)
        if token in CLOSING:
            return self.group(token)
        if token == r"\frac":
            return self.multiply(self.atom(), self.inverse(self.atom()))
        if token == r"\binom":
            return self.binomial(self.atom(), self.atom())
        if token == r"\sqrt":
            degree = self.group("[") if self.take("[") else Fraction(2)
            return self.power(self.atom(), self.inverse(degree))
        return self.function(token[1:]) if token[1:] in FUNCTIONS and token[0] == "\\" else self.variable(token)

    def number(self, token: str) -> Fraction:
        r"""A number, or a mixed one: `2 2/3`, `2\frac{2}{3}`."""
        rest = self.tokens[self.at : self.at + 7]
        if not token.isdigit():
            return Fraction(token)
        if rest[:1] and rest[0].isdigit():
            top, slash, bottom = (*rest, "", "")[:3]
            self.at += 3
        elif rest[::3] == (r"\frac", "}", "}") and rest[1::3] == ("{", "{") and (rest[2] + rest[5]).isdigit():
            top, slash, bottom = rest[2], "/", rest[5]
            self.at += 7
        else:
            return Fraction(token)
        if slash != "/" or not 0 < int(top) < int(bottom):
            raise UnreadableError("two numbers side by side, which are no mixed number")
        return int(token) + Fraction(int(top), int(bottom))

    def group(self, opening: str) -> Number:
        bars, self.bars = self.bars, opening == "|"
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError("too many brackets")
        result = self.sum()
        self.expect(CLOSING[opening])
        self.depth -= 1
        self.bars = bars
        return abs(result) if opening == "|" else result

    def function(self, name: str) -> Number:
        base, power = (Fraction(10), Fraction(1)) if name in ("log", "lg") else (None, Fraction(1))
        if name == "log" and self.take("_"):
            base = Fraction(self.pop()) if self.next.isdigit() else self.atom()
        if self.take("^"):
            power = self.exponent()
            if power == -1 and "a" + name in FUNCTIONS.values():
                name, power = "arc" + name, Fraction(1)
        if self.next in CLOSING:
            argument = self.factor()
        else:  # 2x of \sin 2x \cos y
            argument = self.factor()
            while self.starts_factor() and self.next not in ("(", "[", "|") and self.next[1:] not in FUNCTIONS:
                argument = self.multiply(argument, self.factor())
        result = self.transcendental(FUNCTIONS[name], argument)
        if base is not None:
            result = self.multiply(result, self.inverse(self.transcendental("ln", base)))
        return self.power(result, power)

    def variable(self, token: str) -> Number:
        if token.isalpha() and len(token) > 1:
            if len(token) > 3:
                raise UnreadableError(f"'{token}' is a word")
            return functools.reduce(self.multiply, map(self.variable, token))  # abc is a product
        if token in NO_FACTOR:
            raise UnreadableError(f"'{token}' is not expected here")
        name = token
        if token == r"\mathbb" or self.take("_"):
            name += self.pop()
            while name.count("{") > name.count("}"):
                name += self.pop()
        if name in CONSTANTS:
            return CONSTANTS[name]
        self.names.add(name)
        return random_value(name.replace("{", "").replace("}", ""), self.point)

    def starts_factor(self) -> bool:
        token = self.next
        if not token or token in NO_FACTOR:
            return token == "|" and not self.bars
        if token[0].isdigit() or token[0] == ".":
            raise UnreadableError("a number after a factor, without a sign between")
        return True

    @property
    def next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def pop(self) -> str:
        self.at += 1
        return self.charge(self.tokens[self.at - 1], 64)

    def take(self, token: str) -> bool:
        found = self.next == token
        self.at += found
        return found

    def expect(self, token: str) -> None:
        if not self.take(token):
            raise UnreadableError(f"expected '{token}'")

    # Arithmetic: exact for two fractions, else in `BITS` bits.

    def add(self, left: Number, right: Number) -> Number:
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return self.note(left + right)
        return self.charge(lift(left) + lift(right), 512)  # of any size: it may be what rounding left of a zero

    def multiply(self, left: Number, right: Number) -> Number:
        exact = isinstance(left, Fraction) and isinstance(right, Fraction)
        return self.note(left * right if exact else lift(left) * lift(right))

    def inverse(self, value: Number) -> Number:
        return self.power(value, Fraction(-1))

    def power(self, base: Number, exponent: Number) -> Number:
        if isinstance(exponent, Fraction):
            if exponent.denominator == 1 and isinstance(base, Fraction):
                size = max(base.numerator.bit_length(), base.denominator.bit_length())
                if size > 1 and size * abs(exponent) > MAX_BITS:
                    raise UnreadableError("the number is too large")
                return self.note(base ** int(exponent))
            odd = exponent.denominator % 2 * exponent.denominator > 1
            if odd and not isinstance(base, CONTEXT.mpc) and base < 0:
                root = self.power(-base, exponent)  # the real odd root
                return -root if exponent.numerator % 2 else root
        base, exponent = lift(base), lift(exponent)
        if base and CONTEXT.mag(exponent) + CONTEXT.mag(CONTEXT.mag(base) + 2) > 13:
            raise UnreadableError("the number is too large")
        return self.note(base**exponent)

    def factorial(self, value: Number) -> Number:
        """Exact; a variable's by (x + 1)! = (x + 1) x!, from a pseudo-random one below 1."""
        if not isinstance(value, Fraction) or not -100 < value <= (5000 if value.denominator == 1 else 100):
            raise UnreadableError("the factorial is too large")
        if value.denominator == 1:
            return self.note(Fraction(math.factorial(int(value))))
        start = value % 1
        result = random_value(f"{start}!", self.point)
        for step in range(math.floor(value)):
            result *= start + step + 1
        for step in range(-math.floor(value)):
            result /= start - step
        return self.note(result)

    def binomial(self, top: Number, bottom: Number) -> Number:
        if isinstance(top, Fraction) and isinstance(bottom, Fraction) and top.denominator == bottom.denominator == 1:
            return self.note(Fraction(math.comb(int(top), int(bottom)))) if top <= 5000 else self.factorial(top)
        below = self.multiply(self.factorial(bottom), self.factorial(self.add(top, -bottom)))
        return self.multiply(self.factorial(top), self.inverse(below))

    def transcendental(self, name: str, value: Number) -> Number:
        value = lift(value)
        if CONTEXT.mag(value) > 12 and name != "ln":
            raise UnreadableError("the number is too large")
        return self.note(getattr(CONTEXT, name)(value))

    def note(self, value: Number) -> Number:
        """Charge for a result."""
        if isinstance(value, Fraction):
            return self.charge(value, value.numerator.bit_length() + value.denominator.bit_length())
        return self.charge(_bounded(value), 512)

    def charge(self, value: Any, bits: int) -> Any:
        self.work += bits
        if self.work > MAX_WORK:
            raise UnreadableError("too much to compute")
        return value


def sample(*expressions: tuple[str, ...]) -> list[tuple[list[Number], Number]]:
    """The expressions' values at one point, or at three when there are variables.

    Returns:
        per point: the values (all exact, or none), and the error that they may have.

    Raises:
        UnreadableError: one of them has no value, or it would take too long to compute.
    """
    with _lock:
        points = [[_evaluate(tokens, 0) for tokens in expressions]]
        if any(one.names for one in points[0]):
            points += [[_evaluate(tokens, point) for tokens in expressions] for point in (1, 2)]
        values = [[one.result for one in point] for point in points]
        if all(isinstance(value, Fraction) for point in values for value in point):
            return [(point, 0) for point in values]
        return [([lift(value) for value in point], ERROR) for point in values]


@functools.lru_cache(maxsize=1000)
def _read(tokens: tuple[str, ...], point: int) -> Expression:
    return Expression(tokens, point)  # kept: the items of two lists are compared pair by pair


def _evaluate(tokens: tuple[str, ...], point: int) -> Expression:
    expression = _read(tokens, point)
    if isinstance(expression.result, UnreadableError):
        raise expression.result.with_traceback(None)
    return expression


def lift(value: Number) -> Number:
    """A fraction as a number of `BITS` bits."""
    return _bounded(CONTEXT.mpf(value.numerator) / value.denominator) if isinstance(value, Fraction) else value


def _bounded(value: Number) -> Number:
    if not CONTEXT.isfinite(value) or (value and abs(CONTEXT.mag(value)) > MAX_MAGNITUDE):
        raise UnreadableError("not a finite number, too large or too small")
    return value


@functools.lru_cache(maxsize=1024)
def random_value(name: str, point: int) -> Fraction:
    """The value of a variable: positive at point 0, of either sign at the others.

    The denominator is a power of two, so that no odd root of a negative value is taken by chance.
    """
    draw = random.Random(f"{name}/{point}")
    return Fraction((2 * draw.randrange(20, 200) + 1) * (draw.choice([1, -1]) if point else 1), 128)
