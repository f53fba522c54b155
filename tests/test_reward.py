"""The game24 verifier against written verdicts, against the solver, and against Python's own parser.

The expected values follow the rules (the grammar, the one answer block after the reasoning, a step that is right, new and
possible), not the code. Many rows have fooled a verifier of this kind before: a regex that counted the numbers beside an
`eval` that computed the value.
"""

import ast
import json
import math
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import combinations_with_replacement

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data_prep
import reward

A, B, C = [4, 5, 6, 10], [3, 3, 8, 8], [1, 1, 1, 8]     # B has no solution without fractions
RIGHT = "5 * ( 10 - 6 ) + 4"
STEPS = "10 - 6 = 4\n5 * 4 = 20\n20 + 4 = 24"
THOUGHT = f"<think>\n{STEPS}\n</think>"
ANSWER = f"<answer>{RIGHT}</answer>"
DEEP = "(" * 20 + "5" + ")" * 20 + " * ( 10 - 6 ) + 4"
LONG = RIGHT.replace(" + ", " " * (200 - len(RIGHT) + 1) + "+ ")       # 200 characters


def table(names, *rows):
    """Rows of (id, values...)."""
    return pytest.mark.parametrize(names, [pytest.param(*row[1:], id=row[0]) for row in rows])


def check(parts):
    """What holds for every completion."""
    assert all(0 <= parts[part] <= 1 for part in ("reward", "outcome", "process", "length"))
    assert parts["reward"] == pytest.approx(0.55 * parts["outcome"] + 0.30 * parts["process"] + 0.15 * parts["length"], abs=1e-12)
    assert parts["outcome"] in (0, 0.35, 1) and parts["correct"] == (parts["outcome"] == 1)
    assert parts["answered"] in (0, 1) and parts["answered"] >= (parts["outcome"] > 0)
    pays = parts["outcome"] == 1 or (parts["outcome"] > 0 and not reward.LENGTH_NEEDS_CORRECT)
    assert (parts["length"] > 0) == pays
    return parts


def score(completion, numbers=A, **kwargs):
    return check(reward.score("game24", completion, {"numbers": numbers}, **kwargs))


# The answer: what stands between <answer> and </answer>


@table(
    "numbers, answer, outcome",
    # the grammar
    ("plain", A, RIGHT, 1),
    ("no-spaces", A, "5*(10-6)+4", 1),
    ("spaces-around", A, f"  {RIGHT}  ", 1),
    ("more-brackets", A, "((((5)*((10-6)))+(4)))", 1),
    ("fractions", B, "8 / ( 3 - 8 / 3 )", 1),       # 23.999999999999989 in floating point
    ("equal-numbers", C, "( 1 + 1 + 1 ) * 8", 1),
    ("left-to-right", [2, 3, 4, 9], "9 - 3 - 2 - 4", 0.35),
    ("division-left-to-right", [1, 2, 4, 12], "12 / 2 * 4 / 1", 1),
    ("times-minus-signs", A, "5 × ( 10 − 6 ) + 4", 1),
    ("obelus", B, "8 ÷ ( 3 − 8 ÷ 3 )", 1),
    ("full-width-operators", A, "（5＊（10－6））＋4", 1),
    ("full-width-slash", B, "8 ／ （3 － 8 ／ 3）", 1),
    ("20-levels", A, DEEP, 1),
    ("21-levels", A, f"({DEEP.replace(' * ', ') * ', 1)}", 0),
    ("200-characters", A, LONG, 1),
    ("201-characters", A, LONG.replace("5 *", "5  *"), 0),
    # another value
    ("sum", A, "4 + 5 + 6 + 10", 0.35),
    ("minus-24", A, "5 * ( 6 - 10 ) - 4", 0.35),
    ("zero", B, "( 8 - 8 ) / 3 * 3", 0.35),
    ("just-off", B, "8 * 3 + 3 / 8", 0.35),
    ("division-by-zero", B, "3 / ( 8 - 8 ) + 3", 0),
    ("zero-by-zero", B, "( 8 - 8 ) / ( 3 - 3 )", 0),
    # equals
    ("equals-24", A, f"{RIGHT} = 24", 1),
    ("equals-24-close", A, f"{RIGHT}=24", 1),
    ("equals-24-it-does-not", A, "4 + 5 + 6 + 10 = 24", 0.35),
    ("equals-25-it-does", A, "4 + 5 + 6 + 10 = 25", 0),
    ("equals-25", A, f"{RIGHT} = 25", 0),
    ("equals-24-twice", A, f"{RIGHT} = 24 = 24", 0),
    ("equals-equals", A, f"{RIGHT} == 24", 0),
    ("equals-nothing", A, f"{RIGHT} =", 0),
    ("equals-024", A, f"{RIGHT} = 024", 0),
    ("equals-24.0", A, f"{RIGHT} = 24.0", 0),
    ("equals-2-4", A, f"{RIGHT} = 2 4", 0),
    ("equals-bracket", A, f"{RIGHT} = ( 24 )", 0),
    ("equals-full-width-24", A, f"{RIGHT} = ２４", 0),
    ("equals-first", A, f"24 = {RIGHT}", 0),
    ("equals-inside", A, "( 5 * ( 10 - 6 ) + 4 = 24 )", 0),
    ("equals-only", A, "= 24", 0),
    # the four numbers
    ("empty", A, "", 0),
    ("blank", A, " \n ", 0),
    ("target", A, "24", 0),
    ("two-numbers", A, "4 * 6", 0),
    ("three-numbers", A, "4 * ( 10 - 4 )", 0),
    ("foreign-numbers", A, "8 * 3", 0),
    ("one-foreign", A, "5 * ( 10 - 6 ) + 3 + 1", 0),
    ("times-one", A, f"{RIGHT} * 1", 0),
    ("plus-zero", A, f"{RIGHT} + 0", 0),
    ("used-twice", A, f"{RIGHT} + 4 - 4", 0),
    ("used-twice-for-another", A, "4 + 4 * 5", 0),
    ("one-one-too-few", C, "( 1 + 1 ) * 8", 0),
    ("one-one-too-many", C, "( 1 + 1 + 1 ) * 8 * 1", 0),
    ("both-8-but-3-once", B, "8 + 8 * 3 - 8", 0),
    ("digits-of-the-numbers", A, "4 * 6 + 5 * 0 * 1", 0),
    ("twice-the-answer", A, f"{RIGHT} {RIGHT}", 0),
    ("two-with-comma", A, f"{RIGHT}, {RIGHT}", 0),
    # numbers that are not written as ASCII integers
    ("joined", [1, 2, 3, 5], "12 * ( 5 - 3 )", 0),
    ("joined-by-space", [1, 2, 3, 5], "1 2 * ( 5 - 3 )", 0),
    ("split-10", A, "5 * ( 1 0 - 6 ) + 4", 0),
    ("split-10-newline", A, "5 * ( 1\n0 - 6 ) + 4", 0),
    ("leading-zero", A, "05 * ( 10 - 6 ) + 4", 0),
    ("leading-zero-10", A, "5 * ( 010 - 6 ) + 4", 0),
    ("double-zero", A, "5 * ( 10 - 6 ) + 4 + 00", 0),
    ("decimal-point", A, "5.0 * ( 10 - 6 ) + 4", 0),
    ("bare-point", A, "5. * ( 10 - 6 ) + 4", 0),
    ("decimal-of-two-numbers", [1, 2, 4, 10], "2.4 * 10 * 1", 0),
    ("decimal-comma", [1, 2, 4, 10], "2,4 * 10 * 1", 0),
    ("rounded-fraction", B, "8 / ( 3 - 2.66666666666666666 )", 0),
    ("underscore", A, "5 * ( 1_0 - 6 ) + 4", 0),
    ("hex", A, "5 * ( 0xA - 6 ) + 4", 0),
    ("exponent", A, "5 * ( 1e1 - 6 ) + 4", 0),
    ("complex", A, "5 * ( 10 - 6 ) + 4 + 0j", 0),
    ("full-width-digits", A, "５ * ( １０ - 6 ) + 4", 0),
    ("arabic-digits", A, "٥ * ( ١٠ - 6 ) + 4", 0),
    ("devanagari-digit", A, "५ * ( 10 - 6 ) + 4", 0),
    ("mixed-digits", A, "5 * ( 1０ - 6 ) + 4", 0),
    ("superscript", [1, 2, 3, 3], "2³ * 3 * 1", 0),
    ("circled", A, "5 * ( 10 - 6 ) + ④", 0),
    ("vulgar-fraction", A, "½ * 4", 0),
    ("chinese-numeral", A, "五 * ( 10 - 6 ) + 4", 0),
    ("number-word", A, "five * ( 10 - 6 ) + 4", 0),
    ("huge-150-digits", A, "9" * 150, 0),
    ("huge-5000-digits", A, "9" * 5000, 0),          # int() of more than 4300 digits raises
    ("huge-in-sum", A, f"{RIGHT} + {'9' * 150}", 0),
    # operators that are not there
    ("power", [1, 2, 3, 3], "2 ** 3 * 3 * 1", 0),
    ("power-spaced", [1, 2, 3, 3], "2 * * 3 * 3 * 1", 0),
    ("caret", [1, 2, 3, 3], "2 ^ 3 * 3 * 1", 0),
    ("tiny-power", [2, 9, 10, 12], "2 * 12 + 10 ** -9", 0),
    ("power-tower", [9, 9, 9, 9], "9**9**9**9", 0),
    ("floor-division", [1, 1, 2, 49], "49 // 2 * 1 * 1", 0),
    ("floor-division-spaced", [1, 1, 2, 49], "49 / / 2 * 1 * 1", 0),
    ("modulo", A, "10 % 6 * 5 + 4", 0),              # 24 in Python
    ("shift", [1, 3, 3, 1], "3 << 3 * 1 * 1", 0),    # 24 in Python
    ("bit-or", [8, 16, 8, 16], "8 | 16 | 8 | 16", 0),     # 24 in Python
    ("factorial", C, "( 1 + 1 + 1 + 1 ) !", 0),
    ("root", A, "√4 * 5 + 10 + 6", 0),
    ("unary-minus", A, "- ( 6 - 10 ) * 5 + 4", 0),
    ("unary-minus-inside", A, "5 * ( 10 + -6 ) + 4", 0),
    ("unary-minus-twice", A, "5 * ( 10 - 6 ) - -4", 0),
    ("unary-plus", A, f"+{RIGHT}", 0),
    ("unary-full-width", A, "－（6 － 10） * 5 + 4", 0),
    ("implicit-product", A, "5 ( 10 - 6 ) + 4", 0),
    ("letter-x", A, "5 x ( 10 - 6 ) + 4", 0),
    ("middle-dot", A, "5 · ( 10 - 6 ) + 4", 0),
    ("en-dash", A, "5 * ( 10 – 6 ) + 4", 0),
    ("division-slash", B, "8 ∕ ( 3 - 8 ∕ 3 )", 0),
    ("two-operators", A, "5 * + ( 10 - 6 ) + 4", 0),
    ("operator-first", A, f"* {RIGHT}", 0),
    ("operator-last", A, f"{RIGHT} +", 0),
    ("operators-only", A, "+ - * /", 0),
    # brackets
    ("not-closed", A, f"( {RIGHT}", 0),
    ("not-opened", A, f"{RIGHT} )", 0),
    ("empty-brackets", A, f"{RIGHT} ( )", 0),
    ("only-brackets", A, "( )", 0),
    ("reversed-brackets", A, ") 5 * 10 - 6 + 4 (", 0),
    ("square-brackets", A, "5 * [ 10 - 6 ] + 4", 0),
    ("mixed-brackets", A, "5 * ( 10 - 6 ] + 4", 0),
    ("open-brackets-only", A, "(" * 200, 0),
    # more than an expression
    ("function", A, "abs( 6 - 10 ) * 5 + 4", 0),
    ("import", A, "__import__('os').getpid()", 0),
    ("lambda", A, "(lambda: 24)()", 0),
    ("list", A, f"[{RIGHT}][0]", 0),
    ("comment", A, f"{RIGHT} # 1", 0),
    ("semicolon", A, f"{RIGHT}; 24", 0),
    ("conditional", A, f"{RIGHT} if 1 else 0", 0),
    ("string", A, f"'{RIGHT}'", 0),
    ("words", A, f"The answer is {RIGHT}", 0),
    ("words-after", A, f"{RIGHT} (found it)", 0),
    ("boxed", A, f"\\boxed{{{RIGHT}}}", 0),
    ("latex", A, f"${RIGHT}$", 0),
    ("bold", A, f"**{RIGHT}**", 0),
    ("markup", A, f"<b>{RIGHT}</b>", 0),
    ("entity", A, "5 &times; ( 10 - 6 ) + 4", 0),
    ("nested-answer", A, f"<answer>{RIGHT}</answer>", 0),
    ("nested-think", A, f"<think></think>{RIGHT}", 0),
    ("less-than", A, f"{RIGHT} < 25", 0),
    ("nul", A, f"{RIGHT}\0", 0),
    ("lone-surrogate", A, f"{RIGHT}\ud800", 0),
    ("zero-width-space", A, f"{RIGHT}\u200b", 0),
    ("byte-order-mark", A, f"\ufeff{RIGHT}", 0),
    ("right-to-left-mark", A, f"\u202e{RIGHT}", 0),
)
def test_answer(numbers, answer, outcome):
    parts = score(f"<think>\n</think>\n<answer>{answer}</answer>", numbers)
    assert (parts["outcome"], parts["process"]) == (outcome, 0)      # no step is no process reward, whatever the answer
    assert parts["answered"] or outcome == 0


# The frame: think, then one answer, then the end


@table(
    "completion, outcome, process, answered",       # None: the rules leave it open
    ("clean", f"{THOUGHT}\n{ANSWER}", 1, 1, 1),
    ("one-line-frame", f"<think>{STEPS}</think>{ANSWER}", 1, 1, 1),
    ("windows-newlines", f"{THOUGHT}\n{ANSWER}".replace("\n", "\r\n"), 1, 1, 1),
    ("think-opened-by-the-template", f"\n{STEPS}\n</think>\n{ANSWER}", 1, 1, 1),
    ("empty-think", f"<think></think>{ANSWER}", 1, 0, 1),
    ("wrong-answer", f"{THOUGHT}\n<answer>4 + 5 + 6 + 10</answer>", 0.35, 1, 1),
    ("empty-answer", f"{THOUGHT}\n<answer></answer>", 0, 1, 1),
    ("answer-alone", ANSWER, 0, 0, 0),
    ("no-end-of-think", f"<think>\n{STEPS}\n{ANSWER}", 0, 3 / 4, 0),
    ("no-answer", THOUGHT, 0, 1, 0),
    ("answer-without-tags", f"{THOUGHT}\n{RIGHT}", 0, 1, 0),
    ("answer-not-closed", f"{THOUGHT}\n<answer>{RIGHT}", 0, 1, 0),
    ("answer-not-opened", f"{THOUGHT}\n{RIGHT}</answer>", 0, 1, 0),
    ("answer-tags-swapped", f"{THOUGHT}\n</answer>{RIGHT}<answer>", 0, 1, None),
    ("answer-in-think", f"<think>\n{STEPS}\n{ANSWER}\n</think>", 0, 3 / 4, 0),
    ("answer-in-think-and-after", f"<think>\n{STEPS}\n{ANSWER}\n</think>\n{ANSWER}", 0, 3 / 4, None),
    ("answer-opened-in-think", f"<think>\n{STEPS}\n<answer>\n</think>\n{ANSWER}", 0, 3 / 4, None),
    ("answer-before-think", f"{ANSWER}\n{THOUGHT}", 0, 1, 0),
    ("answer-before-and-after", f"{ANSWER}\n{THOUGHT}\n{ANSWER}", 0, 1, None),
    ("answer-twice", f"{THOUGHT}\n{ANSWER}\n{ANSWER}", 0, 1, None),
    ("answer-right-then-wrong", f"{THOUGHT}\n{ANSWER}\n<answer>4</answer>", 0, 1, None),
    ("answer-wrong-then-right", f"{THOUGHT}\n<answer>4</answer>\n{ANSWER}", 0, 1, None),
    ("answer-then-open-answer", f"{THOUGHT}\n{ANSWER}\n<answer>", 0, 1, None),
    ("end-of-think-twice", f"{THOUGHT}\n</think>\n{ANSWER}", 0, 1, None),
    ("end-of-think-after-answer", f"{THOUGHT}\n{ANSWER}\n</think>", 0, 1, None),
    ("think-twice", f"{THOUGHT}\n{THOUGHT}\n{ANSWER}", 0, 1, None),
    ("think-in-think", f"<think>\n<think>\n{STEPS}\n</think>\n{ANSWER}", 0, 3 / 4, None),
    ("think-after-answer", f"{THOUGHT}\n{ANSWER}\n{THOUGHT}", 0, 1, None),
    ("text-before", f"Sure!\n{THOUGHT}\n{ANSWER}", 0, 1, None),
    ("text-between", f"{THOUGHT}\nSo:\n{ANSWER}", 0, 1, None),
    ("text-after", f"{THOUGHT}\n{ANSWER}\nDone.", 0, 1, None),
    ("long-text-after", f"{THOUGHT}\n{ANSWER}{' ok' * 30_000}", 0, 1, None),
    ("eos-as-text", f"{THOUGHT}\n{ANSWER}<|im_end|>", 0, 1, None),      # EOS is a token, decoding drops it
    ("nul-after", f"{THOUGHT}\n{ANSWER}\0", 0, 1, None),
    ("capital-tags", f"{THOUGHT}\n{ANSWER}".upper(), 0, None, 0),
    ("spaced-tags", f"{THOUGHT}\n< answer >{RIGHT}</ answer >", 0, 1, 0),
    ("attribute", f"{THOUGHT}\n<answer id=1>{RIGHT}</answer>", 0, 1, None),
    ("full-width-tags", f"{THOUGHT}\n＜answer＞{RIGHT}＜/answer＞", 0, 1, 0),
    ("escaped-tags", f"{THOUGHT}\n&lt;answer&gt;{RIGHT}&lt;/answer&gt;", 0, 1, 0),
    ("nothing", "", 0, 0, 0),
    ("blank", " \n\t\n", 0, 0, 0),
    ("only-eos", "<|endoftext|>", 0, 0, 0),
    ("only-many-eos", "<|endoftext|>" * 5_000, 0, 0, 0),
    ("only-open-think", "<think>", 0, 0, 0),
    ("only-close-think", "</think>", 0, 0, 0),
    ("lone-surrogates", "\ud800\udfff" * 50, 0, 0, 0),
    ("nuls", "\0" * 50, 0, 0, 0),
)
def test_frame(completion, outcome, process, answered):
    parts = score(completion)
    assert parts["outcome"] == outcome
    assert process is None or parts["process"] == process
    assert answered is None or parts["answered"] == answered


def test_truncated_is_not_answered():
    parts = score(f"{THOUGHT}\n{ANSWER}", truncated=True)
    assert (parts["outcome"], parts["process"], parts["length"], parts["answered"]) == (0, 1, 0, 0)


# The steps


@table(
    "numbers, lines, right, divisor",
    ("none", A, "", 0, 3),
    ("one", A, "10 - 6 = 4", 1, 3),
    ("two", A, "10 - 6 = 4\n5 * 4 = 20", 2, 3),
    ("three", A, STEPS, 3, 3),
    ("with-states", A, "4 5 6 10 | 10 - 6 = 4\n4 4 5 | 5 * 4 = 20\n20 4 | 20 + 4 = 24", 3, 3),
    ("states-in-any-order", A, "10 4 6 5 | 10 - 6 = 4\n5 4 4 | 5 * 4 = 20\n4 20 | 20 + 4 = 24", 3, 3),
    ("windows-newlines", A, STEPS.replace("\n", "\r\n"), 3, 3),
    ("blank-lines", A, STEPS.replace("\n", "\n\n \n"), 3, 3),
    ("back-to-an-older-state", A, "10 + 4 = 14\n4 5 6 10 | 10 - 6 = 4\n4 4 5 | 5 * 4 = 20\n5 6 14 | 14 + 6 = 20", 4, 4),
    ("same-operation-in-two-states", A, "6 - 5 = 1\n4 5 6 10 | 10 - 4 = 6\n1 4 10 | 10 - 4 = 6", 3, 3),
    ("latest-state-by-another-way", [1, 1, 4, 6],
     "4 / 1 = 4\n1 1 4 6 | 6 - 1 = 5\n1 1 4 6 | 6 / 1 = 6\n4 + 1 = 5\n6 * 5 = 30", 5, 5),     # 1 4 6 is the latest, again
    # repeats
    ("repeat", A, "10 - 6 = 4\n10 - 6 = 4\n10 - 6 = 4", 1, 3),
    ("repeat-30-times", A, "\n".join(["10 - 6 = 4"] * 30), 1, 30),
    ("repeat-swapped", A, "10 + 6 = 16\n6 + 10 = 16\n4 5 6 10 | 10 + 6 = 16", 1, 3),
    ("repeat-with-state", A, "10 - 6 = 4\n4 5 6 10 | 10 - 6 = 4\n10 6 5 4 | 10 - 6 = 4", 1, 3),
    ("repeat-in-another-spelling", B, "3 3 8 8 | 8 / 3 = 8/3\n3 3 8 8 | 8 / 3 = 16/6", 1, 3),
    ("repeat-by-another-way", [1, 1, 4, 6], "4 / 1 = 4\n1 4 6 | 6 - 4 = 2\n1 1 4 6 | 6 / 1 = 6\n1 4 6 | 6 - 4 = 2", 3, 4),
    ("swapped-subtraction-is-another", A, "10 - 6 = 4\n6 - 10 = -4", 2, 3),
    # operands and states that are not there
    ("foreign-numbers", A, "7 + 8 = 15", 0, 3),
    ("one-foreign-number", A, "10 + 8 = 18", 0, 3),
    ("from-nothing", A, "20 + 4 = 24", 0, 3),
    ("step-before-its-operand", A, "5 * 4 = 20\n20 + 4 = 24\n10 - 6 = 4", 2, 3),     # the 4 of the first step is the hand's
    ("operand-twice", A, "5 * 5 = 25", 0, 3),
    ("operand-twice-held-twice", B, "8 + 8 = 16", 1, 3),
    ("operand-three-times", B, "8 + 8 = 16\n16 + 8 = 24", 1, 3),
    ("used-up", A, "4 5 6 10 | 10 - 6 = 4\n4 4 5 | 10 - 5 = 5", 1, 3),
    ("state-never-reached", A, "4 4 5 | 5 * 4 = 20", 0, 3),
    ("state-reached-later", A, "4 4 5 | 5 * 4 = 20\n4 5 6 10 | 10 - 6 = 4", 1, 3),
    ("state-of-a-wrong-step", A, "4 5 6 10 | 10 - 6 = 5\n4 5 5 | 5 + 5 = 10", 0, 3),
    ("state-of-a-wrong-step-unwritten", A, "10 - 6 = 3\n4 * 3 = 12", 0, 3),
    ("state-with-foreign-number", A, "4 5 6 11 | 10 - 6 = 4", 0, 3),
    ("state-with-foreign-operands", A, "7 8 | 7 + 8 = 15", 0, 3),
    ("state-too-small", A, "6 10 | 10 - 6 = 4", 0, 3),
    ("state-too-large", A, "4 4 5 6 10 | 10 - 6 = 4", 0, 3),
    ("state-joins-two-branches", A, "10 - 6 = 4\n4 5 6 10 | 5 - 4 = 1\n4 1 | 4 * 1 = 4", 2, 3),
    ("operands-of-two-branches", A, "10 - 6 = 4\n4 5 6 10 | 10 + 5 = 15\n15 + 5 = 20", 2, 3),
    # arithmetic
    ("wrong", A, "10 - 6 = 5", 0, 3),
    ("wrong-sign", A, "6 - 10 = 4", 0, 3),
    ("wrong-then-right", A, "10 - 6 = 5\n10 - 6 = 4", 1, 3),
    ("negative", A, "6 - 10 = -4\n-4 4 5 | -4 + 4 = 0\n0 5 | 0 * 5 = 0", 3, 3),
    ("fractions", B, "3 3 8 8 | 8 / 3 = 8/3\n8/3 3 8 | 3 - 8/3 = 1/3\n1/3 8 | 8 / 1/3 = 24", 3, 3),
    ("fractions-without-states", B, "8 / 3 = 8/3\n3 - 8/3 = 1/3\n8 / 1/3 = 24", 3, 3),
    ("fraction-as-decimal", B, "8 / 3 = 2.667", 0, 3),
    ("fraction-as-exact-decimal", A, "10 / 4 = 2.5\n10 / 4 = 5/2", 1, 3),
    ("fraction-rounded", B, "8 / 3 = 2\n8 / 3 = 3", 0, 3),
    ("fraction-over-zero", B, "8 / 3 = 8/0", 0, 3),
    ("division-by-zero", B, "8 - 8 = 0\n0 3 3 | 3 / 0 = 0\n0 3 3 | 3 / 0 = 3", 1, 3),
    ("zero-divided", B, "8 - 8 = 0\n0 3 3 | 0 / 3 = 0", 2, 3),
    ("power", A, "4 ** 5 = 1024\n4 ^ 5 = 1024", 0, 3),
    ("floor-division", A, "10 // 4 = 2\n10 % 4 = 2", 0, 3),
    ("leading-zero", A, "10 - 06 = 4\n10 - 6 = 04", 0, 3),
    ("full-width-digits", A, "１０ - ６ = ４", 0, 3),
    ("arabic-digits", A, "١٠ - ٦ = ٤", 0, 3),
    ("underscore", A, "1_0 - 6 = 4", 0, 3),
    ("huge", A, f"10 - 6 = {'9' * 5000}\n{'1' * 5000} - 6 = 4", 0, 3),
    # what a line is
    ("two-steps-in-a-line", A, "10 - 6 = 4, 5 * 4 = 20", 0, 3),
    ("three-steps-in-a-line", A, STEPS.replace("\n", "; "), 0, 3),
    ("chained", A, "10 - 6 = 4 * 5 = 20 + 4 = 24", 0, 3),
    ("three-operands", A, "10 - 6 + 4 = 8", 0, 3),
    ("line-separator", A, STEPS.replace("\n", "\u2028"), 0, 3),
    ("carriage-return", A, STEPS.replace("\n", "\r"), 0, 3),
    ("form-feed", A, STEPS.replace("\n", "\f"), 0, 3),
    ("comment", A, "10 - 6 = 4 (good)", 0, 3),
    ("bullet", A, "- 10 - 6 = 4\n1. 10 - 6 = 4\n* 10 - 6 = 4", 0, 3),
    ("bold", A, "**10 - 6 = 4**", 0, 3),
    ("no-result", A, "10 - 6\n10 - 6 =\n10 - 6 = ?", 0, 3),
    ("result-first", A, "4 = 10 - 6", 0, 3),
    ("state-alone", A, "4 5 6 10\n4 5 6 10 |", 0, 3),
    ("nul-and-surrogate", A, "10 - 6 = 4\0\n10 - 6 = 4\ud800", 0, 3),
    ("prose", A, f"Let me see.\n{STEPS}", 3, 4),
    ("prose-after", A, f"{STEPS}\nFound it!\n24", 3, 5),
    # composing the answer
    ("composed", A, f"{STEPS}\n20 + 4\n( 5 * 4 ) + 4\n( 5 * ( 10 - 6 ) ) + 4", 3, 3),
    ("composed-with-fraction", B, "8 / 3 = 8/3\n3 - 8/3 = 1/3\n8 / 1/3 = 24\n8 / ( 3 - 8 / 3 )", 3, 3),
    ("composed-in-one-line", A, f"{STEPS}\n{RIGHT}", 3, 3),
    ("composed-before-24", A, f"{RIGHT}\n{STEPS}", 3, 4),
    ("composed-in-the-middle", A, "10 - 6 = 4\n5 * 4 = 20\n20 + 4\n20 + 4 = 24", 3, 4),
    ("composed-without-24", A, f"{RIGHT}\n5 * 4 + 4", 0, 3),
    ("composed-after-a-wrong-24", A, f"10 + 6 = 24\n{RIGHT}", 0, 3),
    ("composed-twice", A, f"{STEPS}\n( 5 * 4 ) + 4\n( 5 * 4 ) + 4", 3, 4),
    ("composed-twice-otherwise", A, f"{STEPS}\n( 5 * 4 ) + 4\n4 + 4 * 5", 3, 4),
    ("composed-100-times", A, f"{STEPS}" + f"\n{RIGHT}" * 100, 3, 102),
    ("composed-backwards", A, f"{STEPS}\n{RIGHT}\n5 * 4 + 4\n20 + 4", 3, 5),
    ("composed-wrong-value", A, f"{STEPS}\n5 * 4 + 5", 3, 4),
    ("composed-by-power", A, f"{STEPS}\n2 ** 3 * 3", 3, 4),
    # after the solution, and a lot
    ("new-step-after-24", A, f"{STEPS}\n4 5 6 10 | 10 + 5 = 15", 4, 4),
    ("old-step-after-24", A, f"{STEPS}\n10 - 6 = 4", 3, 4),
    ("from-24-on", A, f"{STEPS}\n24 | 24 + 0 = 24\n24 | 24 * 1 = 24", 3, 5),
    ("5000-lines-of-prose", A, STEPS + "\nhm" * 5000, 3, 5003),
    ("5000-repeats", A, "\n".join(["10 - 6 = 4"] * 5000), 1, 5000),
    ("5000-blank-lines", A, STEPS + "\n" * 5000, 3, 3),
    ("a-line-of-50000", A, f"{STEPS}\n" + "10 - 6 = 4 " * 4500, 3, 4),
)
def test_steps(numbers, lines, right, divisor):
    answer = {tuple(A): RIGHT, tuple(B): "8 / ( 3 - 8 / 3 )"}.get(tuple(numbers), "( 1 + 1 + 4 ) + 6")
    parts = score(f"<think>\n{lines}\n</think>\n<answer>{answer}</answer>", numbers)
    assert parts["process"] == pytest.approx(right / divisor, abs=1e-12)
    assert parts["outcome"] == (0.35 if numbers not in (A, B) else 1)      # no reasoning changes the verdict on the answer


def test_lines_beyond_the_limit_count_as_wrong():
    late = "hm\n" * reward.MAX_LINES + STEPS
    assert score(f"<think>\n{late}\n</think>\n{ANSWER}")["process"] == 0


# The length


@table("lines, expected", *[(f"{n}-lines", n, value) for n, value in (
    (0, 1), (1, 1), (4, 1), (5, 0.9781187290638694), (14, 0.8807970779778823), (24, 0.5), (34, 0.11920292202211755),
    (44, 0.01798620996209156), (10**6, 0))])      # 1/(1+e^-3.8), 1/(1+e^-2), 1/2, 1/(1+e^2), 1/(1+e^4)
def test_length_reward(lines, expected):
    assert reward.length_reward(lines) == pytest.approx(expected, abs=1e-12)


def test_length_reward_falls():
    values = [reward.length_reward(n) for n in range(200)]
    assert values == sorted(values, reverse=True) and all(a > b for a, b in zip(values[4:], values[5:], strict=False))
    assert reward.length_reward(7, threshold=2, midpoint=5, steepness=1.0) == 0.5


def test_length_counts_lines_of_reasoning():
    for n in (0, 1, 4, 5, 24, 44):
        for lines in ("hm\n" * n, "\n" + "hm\n\n" * n):        # blank lines neither pay nor cost
            assert score(f"<think>{lines}</think>{ANSWER}")["length"] == pytest.approx(reward.length_reward(n), abs=1e-12)


@pytest.mark.parametrize("needs_correct", [0, 1])
def test_length_is_paid_for_a_finished_answer(monkeypatch, needs_correct):
    """In a group of wrong answers a length reward becomes a full-size advantage, hence the constant."""
    monkeypatch.setattr(reward, "LENGTH_NEEDS_CORRECT", needs_correct)
    assert score(f"<think></think>{ANSWER}")["length"] == 1
    assert score("<think></think><answer>4 + 5 + 6 + 10</answer>")["length"] == 1 - needs_correct
    for completion in ("", "<think></think><answer>24</answer>", "<think></think>", f"<think>\n{ANSWER}"):
        assert score(completion)["length"] == 0
    assert score(f"<think></think>{ANSWER}", truncated=True)["length"] == 0


# Every hand


def test_every_solvable_hand():
    """What the policy is taught earns everything, and nothing once a number of the answer is another."""
    rng = random.Random(0)
    hands = [h for h in combinations_with_replacement(range(1, 14), 4) if data_prep.solvable(tuple(map(Fraction, h)), 24)]
    assert len(hands) == 1362
    failed = []
    for hand in hands:
        for _ in range(4):
            completion = data_prep.write_trace(list(hand), 24, rng)
            parts = score(completion, list(hand))
            if (parts["outcome"], parts["process"]) != (1, 1):
                failed.append((hand, parts["outcome"], parts["process"], completion))
        thought, answer = completion.split("<answer>")
        number = rng.choice(list(re.finditer("[0-9]+", answer)))
        other = rng.choice([n for n in range(1, 14) if n != int(number[0])])
        changed = f"{thought}<answer>{answer[:number.start()]}{other}{answer[number.end():]}"
        assert score(changed, list(hand))["outcome"] == 0, changed
    assert not failed, f"{len(failed)} traces, the first: {failed[0]}"


# Against Python's parser

SIGNS = str.maketrans("*/-+()", "×÷−＋（）")
PIECES = ["<think>", "</think>", "<answer>", "</answer>", STEPS, RIGHT, "4 5 6 10 | ", "10 - 6 = 4", "24", "8/3",
          *"=|-()\n 0²\0\u2028\ud800"]
PYTHON = {ast.Add: Fraction.__add__, ast.Sub: Fraction.__sub__, ast.Mult: Fraction.__mul__, ast.Div: Fraction.__truediv__}


def by_python(text):
    """(value, sorted leaves) by Python's own parser; None for more than numbers, + - * / and brackets."""
    if re.search(r"[^-+*/() 0-9]|(?<![0-9])0[0-9]", text):     # Python reads 00 as a number
        return None
    leaves = []

    def value(node):
        if isinstance(node, ast.BinOp) and type(node.op) in PYTHON:
            return PYTHON[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            leaves.append(node.value)
            return Fraction(node.value)
        raise ValueError(type(node).__name__)

    try:
        return value(ast.parse(text.strip(), mode="eval").body), sorted(leaves)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


@st.composite
def expressions(draw):
    """(hand, an expression over it)."""
    hand = draw(st.lists(st.integers(1, 13), min_size=4, max_size=4))
    terms = [str(n) for n in draw(st.permutations(hand))]
    space = draw(st.sampled_from(["", " "]))
    while len(terms) > 1:
        i = draw(st.integers(0, len(terms) - 2))
        term = space.join([terms[i], draw(st.sampled_from("+-*/")), terms[i + 1]])
        terms[i:i + 2] = [f"({space}{term}{space})" if draw(st.booleans()) else term]
    return hand, terms[0]


def agrees(hand, text, given_text):
    expected = by_python(text)
    outcome = 0 if expected is None or expected[1] != sorted(hand) else 1 if expected[0] == 24 else 0.35
    assert score(f"<think></think><answer>{given_text}</answer>", hand)["outcome"] == outcome
    if expected is None:
        with pytest.raises(ValueError):
            reward.parse_expression(given_text)
    else:
        value, leaves = reward.parse_expression(given_text)
        assert (value, sorted(leaves)) == expected


@settings(max_examples=400, deadline=None, database=None)
@given(expressions(), st.booleans())
def test_expressions_agree_with_python(case, other_signs):
    hand, text = case
    agrees(hand, text, text.translate(SIGNS) if other_signs else text)


@settings(max_examples=1000, deadline=None, database=None)
@given(expressions(), st.integers(0, 100), st.integers(0, 1), st.sampled_from([*"0123456789+-*/() ", ""]))
@example(([1, 1, 2, 10], "10-1-1-2"), 0, 1, "0")       # 00
@example(([1, 2, 3, 4], "1+2+3+4"), 1, 0, " ")
def test_changed_expressions_agree_with_python(case, place, removed, put):
    """One character replaced, inserted or removed: mostly nonsense, sometimes another expression."""
    hand, text = case
    place %= len(text) + 1
    text = text[:place] + put + text[place + removed:]
    agrees(hand, text, text)


@settings(max_examples=500, deadline=None, database=None)
@given(st.text(st.characters()) | st.lists(st.sampled_from(PIECES), max_size=25).map("".join), st.booleans())
def test_any_text_has_a_score(completion, truncated):
    score(completion, truncated=truncated)


@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(st.integers(1, 13), min_size=4, max_size=4), st.integers(0, 40), st.randoms(use_true_random=False))
def test_random_reasoning(hand, lines, rng):
    """Right steps, repeats, wrong results, states that were never reached and prose: the writer knows which is which."""
    reached, done, text, right = [tuple(sorted(map(Fraction, hand)))], set(), [], 0
    for _ in range(lines):
        state = rng.choice([s for s in reached if len(s) > 1])
        a, b, *rest = rng.sample(state, len(state))
        operator, apply = rng.choice([*zip("+-*/", PYTHON.values(), strict=True)])
        flaw = rng.choice(["", "", "", "result", "state", "prose"])
        result = apply(a, b) if b or operator != "/" else Fraction(0)
        written = [*state[1:], Fraction(1000)] if flaw == "state" else rng.sample(state, len(state))      # 1000 is out of reach
        step = f"{' '.join(map(str, written))} | {a} {operator} {b} = {result + (flaw == 'result')}"
        text.append("hm" if flaw == "prose" else step)
        key = (state, operator, *(sorted((a, b)) if operator in "+*" else (a, b)))
        if flaw or key in done or (operator == "/" and not b):
            continue
        right += 1
        done.add(key)
        reached.append(tuple(sorted([result, *rest])))
    parts = score("<think>" + "\n".join(text) + f"</think>{ANSWER}", hand)
    assert parts["process"] == pytest.approx(right / max(3, lines), abs=1e-12)
    assert parts["steps"] == lines


# The parser


@table(
    "text, value, leaves",
    ("number", "7", 7, [7]),
    ("zero", "0", 0, [0]),
    ("precedence", "1 + 2 * 3 - 4 / 2", 5, [1, 2, 3, 4, 2]),
    ("left-to-right", "8 - 4 - 2", 2, [8, 4, 2]),
    ("division-chain", "8 / 4 / 2 * 3", 3, [8, 4, 2, 3]),
    ("brackets", "8 - ( 4 - 2 )", 6, [8, 4, 2]),
    ("exact", "8 / ( 3 - 8 / 3 )", 24, [8, 3, 8, 3]),
    ("fraction", "1/3", Fraction(1, 3), [1, 3]),
    ("negative", "3 - 5", -2, [3, 5]),
    ("signs", "（8 × 3 ＋ 1）÷ 5 − 2", 3, [8, 3, 1, 5, 2]),
    ("equals", "20 + 4 = 24", 24, [20, 4]),
    ("equals-another-value", "1 + 1=24", 2, [1, 1]),
    ("large", f"{10**50} - {10**50 - 1}", 1, [10**50, 10**50 - 1]),
)
def test_parse_expression(text, value, leaves):
    assert reward.parse_expression(text) == (value, leaves)
    assert isinstance(reward.parse_expression(text)[0], Fraction)


@pytest.mark.parametrize("text", [
    "", " ", "= 24", "+", "()", "(", ")", "(1", "1)", "1 2", "1 (2)", "(1)(2)", "1 +", "* 1", "1 + * 2", "-1", "+1", "1 - -1",
    "01", "00", "0 1", "1.5", ".5", "1,5", "1e3", "1_0", "0x1", "２", "٢", "2²", "x", "2 ** 3", "7 // 2", "7 % 2", "2 ^ 3", "3!",
    "1 / 0", "1 / (2 - 2)", "0 / 0", "1 = 1", "1 == 24", "24 =", "24 = 24 = 24", "= 24 = 24", "[1]", "1;", "1 < 2", "1\0",
    "\ud800", "(" * 21 + "1" + ")" * 21, "1" * 201, "1" + "+1" * 100, "(" * 100_000], ids=lambda text: ascii(text)[:30])
def test_parse_expression_refuses(text):
    with pytest.raises(ValueError):
        reward.parse_expression(text)


# Rows, tasks and the two outside interfaces


@pytest.mark.parametrize("row", [
    *({"numbers": numbers} for numbers in (
        None, 4, [], [4, 5, 6], [4, 5, 6, 10, 1], "4561", "4 5 6 10", ["4", "5", "6", "10"], [0, 5, 6, 10], [-4, 5, 6, 10],
        [True, 5, 6, 10], [4.0, 5, 6, 10], [4, 5, 6, None], [4, 5, 6, math.nan], [[4], 5, 6, 10], {4: 1, 5: 1, 6: 1, 10: 1})),
    *({"numbers": A, "target": target} for target in (None, 0, -24, 24.0, True, "24")),
    {}, None, 24, "4 5 6 10", [], A], ids=repr)
def test_unusable_row(row):
    """None, which leaves the row out: neither 0 nor 1 would be true of the completion."""
    for completion in (f"{THOUGHT}\n{ANSWER}", ""):
        assert reward.score("game24", completion, row) is None
    with pytest.raises(ValueError):
        reward.check_row("game24", row)


def test_target_of_the_row():
    row = {"numbers": [1, 2, 3, 4], "target": 10}
    for answer, outcome in (("1 + 2 + 3 + 4", 1), ("1 + 2 + 3 + 4 = 10", 1), ("1 * 2 * 3 * 4", 0.35), ("1 + 2 + 3 + 4 = 24", 0)):
        assert reward.score("game24", f"<think></think><answer>{answer}</answer>", row)["outcome"] == outcome


def test_unknown_task():
    with pytest.raises(ValueError, match="game24"):
        reward.score("game25", ANSWER, {"numbers": A})


TRL = [f"{THOUGHT}\n{ANSWER}", f"{THOUGHT}\n<answer>4 + 5 + 6 + 10</answer>", "", ANSWER]


@pytest.mark.parametrize("chat", [False, True])
def test_trl_signature(chat):
    completions = [[{"role": "assistant", "content": text}] for text in TRL] if chat else TRL
    prompts = [[{"role": "user", "content": "Make 24"}]] * 4 if chat else ["Make 24"] * 4
    rewards = reward.game24(prompts=prompts, completions=completions, numbers=[A] * 4, completion_ids=[[1]] * 4)
    assert rewards == [reward.score("game24", text, {"numbers": A})["reward"] for text in TRL]
    assert rewards[2] == 0                           # a zero is a reward, not a row to leave out
    assert rewards[0] == pytest.approx(1)


def test_trl_leaves_out_bad_rows():
    assert reward.game24(["p"] * 4, [TRL[2]] * 4, [A, [4, 5, 6], None, "4 5 6 10"]) == [0, None, None, None]


def test_trl_target_column():
    text = "<think>\n4 5 6 10 | 4 + 5 = 9\n9 6 10 | 9 + 6 = 15\n15 10 | 15 + 10 = 25\n</think>\n<answer> 4 + 5 + 6 + 10 </answer>"
    right, wrong = reward.game24(["p"] * 2, [text] * 2, [A] * 2, target=[25, 24])
    assert right == pytest.approx(1) and wrong < 0.5


@pytest.mark.parametrize("truth", [A, tuple(A), json.dumps(A), {"numbers": A}, json.dumps({"numbers": A, "id": "x"})], ids=repr)
def test_verl_signature(truth):
    for text in TRL:
        value = reward.compute_score(data_source="game24", solution_str=text, ground_truth=truth, extra_info={"index": 0})
        assert type(value) is float and value == reward.score("game24", text, {"numbers": A})["reward"]


@pytest.mark.parametrize("truth", [
    None, 24, [], [4, 5, 6], ["4", "5", "6", "10"], {}, {"numbers": None},
    "", "24", "null", "4 5 6 10", "[4, 5, 6]", "{}", "["], ids=repr)
def test_verl_unusable_ground_truth(truth):
    with pytest.raises(ValueError):
        reward.compute_score("game24", TRL[0], truth)


# Threads and time

NASTY = {
    "brackets": f"{THOUGHT}<answer>{'(' * 100_000}</answer>",
    "digits": f"{THOUGHT}<answer>{'9' * 100_000}</answer>",
    "power-tower": f"{THOUGHT}<answer>{'9**' * 33_000}9</answer>",
    "spaces": " " * 100_000,
    "spaces-in-answer": f"{THOUGHT}<answer>{RIGHT}{' ' * 100_000}= 25</answer>",
    "spaces-after-answer": f"{THOUGHT}{ANSWER}{' ' * 100_000}x",
    "newlines": f"<think>{chr(10) * 100_000}</think>{ANSWER}",
    "think-tags": "<think>" * 14_000,
    "end-tags": "</think>" * 12_500,
    "answer-tags": f"{THOUGHT}{'<answer>' * 12_500}",
    "less-than": f"<think>{'<' * 100_000}</think>{'<' * 1000}",
    "one-long-line": f"<think>\n{STEPS}\n{'1 ' * 50_000}\n</think>{ANSWER}",
    "fraction-line": f"<think>\n{'1/1 ' * 49}\n{'1/' * 50_000}\n</think>{ANSWER}",
    "long-lines": f"<think>\n{STEPS}\n" + ("(1+" * 65 + "\n") * 500 + f"</think>{ANSWER}",
    "repeats": "<think>\n" + "10 - 6 = 4\n" * 9_000 + f"</think>{ANSWER}",
    "composing": f"<think>\n{STEPS}\n" + f"{RIGHT}\n" * 5_000 + f"</think>{ANSWER}",
    "unicode": "（" * 100_000,
}


@pytest.mark.parametrize("name", NASTY)
def test_time_is_bounded(name):
    """Generous, for a busy machine: only a quadratic blow-up fails."""
    def seconds():
        start = time.perf_counter()
        score(NASTY[name])
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.1


def test_same_verdicts_from_threads():
    texts = [f"<think>\n{'10 - 6 = 4' * (n % 3)}\n{STEPS[:n % 40]}\n</think>{TRL[n % 4]}" for n in range(400)] + TRL
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(score, texts)) == [score(text) for text in texts]
