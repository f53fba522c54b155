"""The game24 verifier against written verdicts, the solver, and Python's own parser.

The expected values follow the rules, not the code. Many cases have fooled verifiers that count the numbers by a regex
and compute the value by `eval`.
"""

import json
import math
import operator
import random
import re
import timeit
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import combinations_with_replacement, pairwise

import numpy
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
WHOLE = f"{THOUGHT}\n{ANSWER}"
DEEP = "(" * 20 + "5" + ")" * 20 + " * ( 10 - 6 ) + 4"
LONG = RIGHT.replace(" + ", " " * (200 - len(RIGHT) + 1) + "+ ")       # 200 characters


def short(value):
    return ascii(value)[:40]


def check(parts):
    """What holds for every completion."""
    assert all(0 <= parts[part] <= 1 for part in ("reward", "outcome", "process", "length"))
    total = 0.55 * parts["outcome"] + 0.30 * parts["process"] + 0.15 * parts["length"]
    assert parts["reward"] == pytest.approx(total, abs=1e-12)
    assert parts["outcome"] in (0, 0.35, 1) and parts["correct"] == (parts["outcome"] == 1)
    assert parts["answered"] in (0, 1) and parts["answered"] >= (parts["outcome"] > 0)
    pays = parts["outcome"] == 1 or (parts["outcome"] > 0 and not reward.LENGTH_NEEDS_CORRECT)
    assert (parts["length"] > 0) == pays
    return parts


def score(completion, numbers=A, **kwargs):
    return check(reward.score("game24", completion, {"numbers": numbers}, **kwargs))


# The answer: what stands between <answer> and </answer>

ANSWERS = [     # numbers, outcome, answers
    (A, 1, [RIGHT, "5*(10-6)+4", f"  {RIGHT}  ", "((((5)*((10-6)))+(4)))", "5 × ( 10 − 6 ) + 4", "（5＊（10－6））＋4",
            DEEP, LONG, f"{RIGHT} = 24", f"{RIGHT}=24"]),
    (B, 1, ["8 / ( 3 - 8 / 3 )",       # 23.999999999999989 in floating point
            "8 ÷ ( 3 − 8 ÷ 3 )", "8 ／ （3 － 8 ／ 3）"]),
    (C, 1, ["( 1 + 1 + 1 ) * 8"]),
    ([1, 2, 4, 12], 1, ["12 / 2 * 4 / 1"]),
    # another value
    (A, 0.35, ["4 + 5 + 6 + 10", "5 * ( 6 - 10 ) - 4", "4 + 5 + 6 + 10 = 24"]),
    (B, 0.35, ["( 8 - 8 ) / 3 * 3", "8 * 3 + 3 / 8"]),
    ([2, 3, 4, 9], 0.35, ["9 - 3 - 2 - 4"]),
    # too deep, too long, divided by zero
    (A, 0, [f"({DEEP.replace(' * ', ') * ', 1)}", LONG.replace("5 *", "5  *")]),
    (B, 0, ["3 / ( 8 - 8 ) + 3", "( 8 - 8 ) / ( 3 - 3 )"]),
    # equals
    (A, 0, ["4 + 5 + 6 + 10 = 25", "= 24", f"24 = {RIGHT}", "( 5 * ( 10 - 6 ) + 4 = 24 )",
            *(RIGHT + end for end in (" = 25", " = 24 = 24", " == 24", " =", " = 024", " = 24.0", " = 2 4", " = ( 24 )",
                                      " = ２４"))]),
    # the four numbers, each once
    (A, 0, ["", " \n ", "24", "4 * 6", "4 * ( 10 - 4 )", "8 * 3", "5 * ( 10 - 6 ) + 3 + 1", "4 + 4 * 5",
            "4 * 6 + 5 * 0 * 1", *(RIGHT + end for end in (" * 1", " + 0", " + 4 - 4", f" {RIGHT}", f", {RIGHT}"))]),
    (C, 0, ["( 1 + 1 ) * 8", "( 1 + 1 + 1 ) * 8 * 1"]),
    (B, 0, ["8 + 8 * 3 - 8"]),
    # numbers that are not ASCII integers
    ([1, 2, 3, 5], 0, ["12 * ( 5 - 3 )", "1 2 * ( 5 - 3 )"]),
    (A, 0, ["5 * ( 1 0 - 6 ) + 4", "5 * ( 1\n0 - 6 ) + 4", "05 * ( 10 - 6 ) + 4", "5 * ( 010 - 6 ) + 4",
            "5 * ( 10 - 6 ) + 4 + 00", "5.0 * ( 10 - 6 ) + 4", "5. * ( 10 - 6 ) + 4", "5 * ( 1_0 - 6 ) + 4",
            "5 * ( 0xA - 6 ) + 4", "5 * ( 1e1 - 6 ) + 4", "5 * ( 10 - 6 ) + 4 + 0j", "５ * ( １０ - 6 ) + 4",
            "٥ * ( ١٠ - 6 ) + 4", "५ * ( 10 - 6 ) + 4", "5 * ( 1０ - 6 ) + 4", "5 * ( 10 - 6 ) + ④", "½ * 4",
            "五 * ( 10 - 6 ) + 4", "five * ( 10 - 6 ) + 4", "9" * 150, f"{RIGHT} + {'9' * 150}",
            "9" * 5000]),     # int() of more than 4300 digits raises
    ([1, 2, 4, 10], 0, ["2.4 * 10 * 1", "2,4 * 10 * 1"]),
    (B, 0, ["8 / ( 3 - 2.66666666666666666 )"]),
    # other operators
    ([1, 2, 3, 3], 0, ["2³ * 3 * 1", "2 ** 3 * 3 * 1", "2 * * 3 * 3 * 1", "2 ^ 3 * 3 * 1"]),
    ([2, 9, 10, 12], 0, ["2 * 12 + 10 ** -9"]),
    ([9, 9, 9, 9], 0, ["9**9**9**9"]),
    ([1, 1, 2, 49], 0, ["49 // 2 * 1 * 1", "49 / / 2 * 1 * 1"]),
    (A, 0, ["10 % 6 * 5 + 4"]),                     # these three are 24 in Python
    ([1, 3, 3, 1], 0, ["3 << 3 * 1 * 1"]),
    ([8, 16, 8, 16], 0, ["8 | 16 | 8 | 16"]),
    (C, 0, ["( 1 + 1 + 1 + 1 ) !"]),
    (B, 0, ["8 ∕ ( 3 - 8 ∕ 3 )"]),
    (A, 0, ["√4 * 5 + 10 + 6", "- ( 6 - 10 ) * 5 + 4", "5 * ( 10 + -6 ) + 4", "5 * ( 10 - 6 ) - -4", f"+{RIGHT}",
            "－（6 － 10） * 5 + 4", "5 ( 10 - 6 ) + 4", "5 x ( 10 - 6 ) + 4", "5 · ( 10 - 6 ) + 4",
            "5 * ( 10 – 6 ) + 4", "5 * + ( 10 - 6 ) + 4", f"* {RIGHT}", f"{RIGHT} +", "+ - * /"]),
    # brackets
    (A, 0, [f"( {RIGHT}", f"{RIGHT} )", f"{RIGHT} ( )", "( )", ") 5 * 10 - 6 + 4 (", "5 * [ 10 - 6 ] + 4",
            "5 * ( 10 - 6 ] + 4", "(" * 200]),
    # more than an expression
    (A, 0, ["abs( 6 - 10 ) * 5 + 4", "__import__('os').getpid()", "(lambda: 24)()", f"[{RIGHT}][0]", f"{RIGHT} # 1",
            f"{RIGHT}; 24", f"{RIGHT} if 1 else 0", f"'{RIGHT}'", f"The answer is {RIGHT}", f"{RIGHT} (found it)",
            f"\\boxed{{{RIGHT}}}", f"${RIGHT}$", f"**{RIGHT}**", f"<b>{RIGHT}</b>", "5 &times; ( 10 - 6 ) + 4",
            f"<answer>{RIGHT}</answer>", f"<think></think>{RIGHT}", f"{RIGHT} < 25", f"{RIGHT}\0", f"{RIGHT}\ud800",
            f"{RIGHT}\u200b", f"\ufeff{RIGHT}", f"\u202e{RIGHT}"]),
]


@pytest.mark.parametrize("numbers, answer, outcome", [
    (numbers, answer, outcome) for numbers, outcome, answers in ANSWERS for answer in answers], ids=short)
def test_answer(numbers, answer, outcome):
    parts = score(f"<think>\n</think>\n<answer>{answer}</answer>", numbers)
    assert (parts["outcome"], parts["process"]) == (outcome, 0)      # no step is no process reward, whatever the answer
    assert parts["answered"] or outcome == 0


# The frame: think, then one answer, then the end

FRAMES = [      # outcome, process, answered (None: the rules leave it open), completions
    (1, 1, 1, [WHOLE, WHOLE.replace("\n", "\r\n"), f"<think>{STEPS}</think>{ANSWER}",
               f"\n{STEPS}\n</think>\n{ANSWER}"]),         # a chat template may have opened the thought
    (1, 0, 1, [f"<think></think>{ANSWER}"]),
    (0.35, 1, 1, [f"{THOUGHT}\n<answer>4 + 5 + 6 + 10</answer>"]),
    (0, 1, 1, [f"{THOUGHT}\n<answer></answer>"]),
    (0, 0, 0, [ANSWER, "", " \n\t\n", "<|endoftext|>", "<|endoftext|>" * 5_000, "<think>", "</think>",
               "\ud800\udfff" * 50, "\0" * 50]),
    (0, 3 / 4, 0, [f"<think>\n{STEPS}\n{ANSWER}", f"<think>\n{STEPS}\n{ANSWER}\n</think>"]),
    (0, 3 / 4, None, [f"<think>\n{STEPS}\n{ANSWER}\n</think>\n{ANSWER}", f"<think>\n{WHOLE}",
                      f"<think>\n{STEPS}\n<answer>\n</think>\n{ANSWER}"]),
    (0, 1, 0, [THOUGHT, f"{ANSWER}\n{THOUGHT}",
               *(f"{THOUGHT}\n{text}" for text in (
                   RIGHT, f"<answer>{RIGHT}", f"{RIGHT}</answer>", f"< answer >{RIGHT}</ answer >",
                   f"＜answer＞{RIGHT}＜/answer＞", f"&lt;answer&gt;{RIGHT}&lt;/answer&gt;"))]),
    (0, None, 0, [WHOLE.upper()]),
    # two answers or thoughts, and text around; EOS is a token, which decoding drops
    (0, 1, None, [f"{ANSWER}\n{WHOLE}", f"{THOUGHT}\n{WHOLE}", f"Sure!\n{WHOLE}",
                  *(f"{THOUGHT}\n{text}" for text in (
                      f"</answer>{RIGHT}<answer>", f"<answer>4</answer>\n{ANSWER}", f"</think>\n{ANSWER}",
                      f"<answer id=1>{RIGHT}</answer>", f"So:\n{ANSWER}")),
                  *(WHOLE + end for end in (
                      f"\n{ANSWER}", "\n<answer>4</answer>", "\n<answer>", "\n</think>", f"\n{THOUGHT}", "\nDone.",
                      " ok" * 30_000, "<|im_end|>", "\0"))]),
]


@pytest.mark.parametrize("completion, outcome, process, answered", [
    (completion, *verdict) for *verdict, completions in FRAMES for completion in completions], ids=short)
def test_frame(completion, outcome, process, answered):
    parts = score(completion)
    assert parts["outcome"] == outcome
    assert process is None or parts["process"] == process
    assert answered is None or parts["answered"] == answered


def test_truncated_is_not_answered():
    parts = score(f"{THOUGHT}\n{ANSWER}", truncated=True)
    assert (parts["outcome"], parts["process"], parts["length"], parts["answered"]) == (0, 1, 0, 0)


# The steps

REASONING = [       # numbers, right steps, divisor, reasonings
    (A, 3, 3, [STEPS, STEPS.replace("\n", "\r\n"), STEPS.replace("\n", "\n\n \n"), STEPS + "\n" * 5000,
               "4 5 6 10 | 10 - 6 = 4\n4 4 5 | 5 * 4 = 20\n20 4 | 20 + 4 = 24",
               "10 4 6 5 | 10 - 6 = 4\n5 4 4 | 5 * 4 = 20\n4 20 | 20 + 4 = 24",
               "6 - 5 = 1\n4 5 6 10 | 10 - 4 = 6\n1 4 10 | 10 - 4 = 6",
               "6 - 10 = -4\n-4 4 5 | -4 + 4 = 0\n0 5 | 0 * 5 = 0"]),
    (A, 4, 4, ["10 + 4 = 14\n4 5 6 10 | 10 - 6 = 4\n4 4 5 | 5 * 4 = 20\n5 6 14 | 14 + 6 = 20",
               f"{STEPS}\n4 5 6 10 | 10 + 5 = 15"]),
    (A, 2, 3, ["10 - 6 = 4\n5 * 4 = 20", "10 - 6 = 4\n6 - 10 = -4",
               "5 * 4 = 20\n20 + 4 = 24\n10 - 6 = 4",                       # the 4 of the first step is the hand's
               "10 - 6 = 4\n4 5 6 10 | 5 - 4 = 1\n4 1 | 4 * 1 = 4",         # joins two branches
               "10 - 6 = 4\n4 5 6 10 | 10 + 5 = 15\n15 + 5 = 20"]),
    # 1 4 6, reached again, is the latest state
    ([1, 1, 4, 6], 5, 5, ["4 / 1 = 4\n1 1 4 6 | 6 - 1 = 5\n1 1 4 6 | 6 / 1 = 6\n4 + 1 = 5\n6 * 5 = 30"]),
    (B, 3, 3, ["3 3 8 8 | 8 / 3 = 8/3\n8/3 3 8 | 3 - 8/3 = 1/3\n1/3 8 | 8 / 1/3 = 24",
               "8 / 3 = 8/3\n3 - 8/3 = 1/3\n8 / 1/3 = 24"]),
    (B, 2, 3, ["8 - 8 = 0\n0 3 3 | 0 / 3 = 0"]),
    # repeats
    (A, 1, 3, ["10 - 6 = 4", "10 - 6 = 4\n10 - 6 = 4\n10 - 6 = 4", "10 + 6 = 16\n6 + 10 = 16\n4 5 6 10 | 10 + 6 = 16",
               "10 - 6 = 4\n4 5 6 10 | 10 - 6 = 4\n10 6 5 4 | 10 - 6 = 4"]),
    (A, 1, 30, ["\n".join(["10 - 6 = 4"] * 30)]),
    (A, 1, 5000, ["\n".join(["10 - 6 = 4"] * 5000)]),
    (A, 3, 4, [f"{STEPS}\n10 - 6 = 4"]),
    (B, 1, 3, ["3 3 8 8 | 8 / 3 = 8/3\n3 3 8 8 | 8 / 3 = 16/6"]),
    ([1, 1, 4, 6], 3, 4, ["4 / 1 = 4\n1 4 6 | 6 - 4 = 2\n1 1 4 6 | 6 / 1 = 6\n1 4 6 | 6 - 4 = 2"]),
    # operands and states that were never reached
    (A, 0, 3, ["", "7 + 8 = 15", "10 + 8 = 18", "20 + 4 = 24", "5 * 5 = 25", "4 4 5 | 5 * 4 = 20",
               "4 5 6 10 | 10 - 6 = 5\n4 5 5 | 5 + 5 = 10", "10 - 6 = 3\n4 * 3 = 12", "4 5 6 11 | 10 - 6 = 4",
               "7 8 | 7 + 8 = 15", "6 10 | 10 - 6 = 4", "4 4 5 6 10 | 10 - 6 = 4"]),
    (A, 1, 3, ["4 5 6 10 | 10 - 6 = 4\n4 4 5 | 10 - 5 = 5", "4 4 5 | 5 * 4 = 20\n4 5 6 10 | 10 - 6 = 4"]),
    (B, 1, 3, ["8 + 8 = 16", "8 + 8 = 16\n16 + 8 = 24"]),
    # arithmetic
    (A, 0, 3, ["10 - 6 = 5", "6 - 10 = 4", "4 ** 5 = 1024\n4 ^ 5 = 1024", "10 // 4 = 2\n10 % 4 = 2",
               "10 - 06 = 4\n10 - 6 = 04", "１０ - ６ = ４", "١٠ - ٦ = ٤", "1_0 - 6 = 4",
               f"10 - 6 = {'9' * 5000}\n{'1' * 5000} - 6 = 4"]),
    (A, 1, 3, ["10 - 6 = 5\n10 - 6 = 4", "10 / 4 = 2.5\n10 / 4 = 5/2"]),
    (B, 0, 3, ["8 / 3 = 2.667", "8 / 3 = 2\n8 / 3 = 3", "8 / 3 = 8/0"]),
    (B, 1, 3, ["8 - 8 = 0\n0 3 3 | 3 / 0 = 0\n0 3 3 | 3 / 0 = 3"]),
    # what a line is
    (A, 0, 3, ["10 - 6 = 4, 5 * 4 = 20", STEPS.replace("\n", "; "), "10 - 6 = 4 * 5 = 20 + 4 = 24", "10 - 6 + 4 = 8",
               STEPS.replace("\n", "\u2028"), STEPS.replace("\n", "\r"), STEPS.replace("\n", "\f"), "10 - 6 = 4 (good)",
               "- 10 - 6 = 4\n1. 10 - 6 = 4\n* 10 - 6 = 4", "**10 - 6 = 4**", "10 - 6\n10 - 6 =\n10 - 6 = ?",
               "4 = 10 - 6", "4 5 6 10\n4 5 6 10 |", "10 - 6 = 4\0\n10 - 6 = 4\ud800"]),
    (A, 3, 4, [f"Let me see.\n{STEPS}", f"{STEPS}\n" + "10 - 6 = 4 " * 4500]),
    (A, 3, 5, [f"{STEPS}\nFound it!\n24", f"{STEPS}\n24 | 24 + 0 = 24\n24 | 24 * 1 = 24"]),
    (A, 3, 5003, [STEPS + "\nhm" * 5000]),
    # composing the answer
    (A, 3, 3, [f"{STEPS}\n20 + 4\n( 5 * 4 ) + 4\n( 5 * ( 10 - 6 ) ) + 4", f"{STEPS}\n{RIGHT}"]),
    (B, 3, 3, ["8 / 3 = 8/3\n3 - 8/3 = 1/3\n8 / 1/3 = 24\n8 / ( 3 - 8 / 3 )"]),
    (A, 3, 4, [f"{RIGHT}\n{STEPS}", "10 - 6 = 4\n5 * 4 = 20\n20 + 4\n20 + 4 = 24",
               f"{STEPS}\n( 5 * 4 ) + 4\n( 5 * 4 ) + 4", f"{STEPS}\n( 5 * 4 ) + 4\n4 + 4 * 5",
               f"{STEPS}\n5 * 4 + 5", f"{STEPS}\n2 ** 3 * 3"]),
    (A, 0, 3, [f"{RIGHT}\n5 * 4 + 4", f"10 + 6 = 24\n{RIGHT}"]),
    (A, 3, 5, [f"{STEPS}\n{RIGHT}\n5 * 4 + 4\n20 + 4"]),
    (A, 3, 102, [f"{STEPS}" + f"\n{RIGHT}" * 100]),
]


@pytest.mark.parametrize("numbers, right, divisor, lines", [
    (*verdict, lines) for *verdict, reasonings in REASONING for lines in reasonings], ids=short)
def test_steps(numbers, right, divisor, lines):
    answer = {tuple(A): RIGHT, tuple(B): "8 / ( 3 - 8 / 3 )"}.get(tuple(numbers), "( 1 + 1 + 4 ) + 6")
    parts = score(f"<think>\n{lines}\n</think>\n<answer>{answer}</answer>", numbers)
    assert parts["process"] == pytest.approx(right / divisor, abs=1e-12)
    assert parts["outcome"] == (1 if numbers in (A, B) else 0.35)      # whatever the reasoning


def test_lines_beyond_the_limit_count_as_wrong():
    late = "hm\n" * reward.MAX_LINES + STEPS
    assert score(f"<think>\n{late}\n</think>\n{ANSWER}")["process"] == 0


# The length


@pytest.mark.parametrize("lines, expected", [
    (0, 1), (1, 1), (4, 1), (5, 0.9781187290638694), (14, 0.8807970779778823), (24, 0.5), (34, 0.11920292202211755),
    (44, 0.01798620996209156), (10**6, 0)])      # 1/(1+e^-3.8), 1/(1+e^-2), 1/2, 1/(1+e^2), 1/(1+e^4)
def test_length_reward(lines, expected):
    assert reward.length_reward(lines) == pytest.approx(expected, abs=1e-12)


def test_length_reward_falls():
    values = [reward.length_reward(n) for n in range(200)]
    assert values[:5] == [1] * 5 and all(a > b for a, b in pairwise(values[4:]))
    assert reward.length_reward(7, threshold=2, midpoint=5, steepness=1.0) == 0.5


@pytest.mark.parametrize("n", [0, 1, 4, 5, 24, 44])
def test_length_counts_lines_of_reasoning(n):
    for lines in ("hm\n" * n, "\n" + "hm\n\n" * n):        # blank lines neither pay nor cost
        length = score(f"<think>{lines}</think>{ANSWER}")["length"]
        assert length == pytest.approx(reward.length_reward(n), abs=1e-12)


@pytest.mark.parametrize("needs_correct", [0, 1])
def test_length_is_paid_for_a_finished_answer(monkeypatch, needs_correct):
    """In a group of wrong answers a length reward becomes a full-size advantage, hence the constant."""
    monkeypatch.setattr(reward, "LENGTH_NEEDS_CORRECT", needs_correct)
    assert score(f"<think></think>{ANSWER}")["length"] == 1
    assert score("<think></think><answer>4 + 5 + 6 + 10</answer>")["length"] == 1 - needs_correct
    for completion in ("", "<think></think><answer>24</answer>", "<think></think>", f"<think>\n{ANSWER}"):
        assert score(completion)["length"] == 0
    assert score(f"<think></think>{ANSWER}", truncated=True)["length"] == 0


# Against the solver and Python's parser


def test_every_solvable_hand():
    """What the policy is taught earns everything, and nothing once a number of the answer is another."""
    rng = random.Random(0)
    hands = combinations_with_replacement(range(1, 14), 4)
    hands = [list(hand) for hand in hands if reward.solvable(tuple(map(Fraction, hand)), 24)]
    assert len(hands) == 1362
    for hand in hands:
        for _ in range(4):
            completion = data_prep.write_trace(hand, 24, rng)
            parts = score(completion, hand)
            assert (parts["outcome"], parts["process"]) == (1, 1), completion
        thought, answer = completion.split("<answer>")
        number = rng.choice(list(re.finditer("[0-9]+", answer)))
        other = rng.choice([n for n in range(1, 14) if n != int(number[0])])
        changed = f"{thought}<answer>{answer[:number.start()]}{other}{answer[number.end():]}"
        assert score(changed, hand)["outcome"] == 0, changed


SIGNS = str.maketrans("*/-+()", "×÷−＋（）")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
PIECES = ["<think>", "</think>", "<answer>", "</answer>", STEPS, RIGHT, "4 5 6 10 | ", "10 - 6 = 4", "24", "8/3",
          *"=|-()\n 0²\0\u2028\ud800"]


def by_python(text):
    """(value, sorted numbers) by `eval`; None for more than whole numbers, + - * / between them, and brackets."""
    if re.search(r"[^-+*/() 0-9]|\*\*|//|(^|[-+*/(]) *[-+]|(?<![0-9])0[0-9]", text):
        return None
    try:
        value = eval(re.sub("[0-9]+", r"Fraction(\g<0>)", text).strip())
    except (SyntaxError, TypeError, ZeroDivisionError):
        return None
    return (value, sorted(map(int, re.findall("[0-9]+", text)))) if isinstance(value, Fraction) else None


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


@settings(max_examples=1200, deadline=None, database=None)
@given(expressions(), st.integers(0, 100), st.integers(0, 1), st.sampled_from([*"0123456789+-*/() ", *[""] * 9]),
       st.booleans())
@example(([1, 1, 2, 10], "10-1-1-2"), 0, 1, "0", False)       # 00
@example(([1, 2, 3, 4], "1+2+3+4"), 1, 0, " ", False)
def test_expressions_agree_with_python(case, place, removed, put, other_signs):
    """An expression as it is, or with one character replaced, inserted or removed: mostly nonsense."""
    hand, text = case
    place %= len(text) + 1
    text = text[:place] + put + text[place + removed:]
    expected = by_python(text)
    given_text = text.translate(SIGNS) if other_signs else text
    outcome = score(f"<think></think><answer>{given_text}</answer>", hand)["outcome"]
    if expected is None:
        assert outcome == 0
        with pytest.raises(ValueError):
            reward.parse_expression(given_text)
        return
    value, leaves = reward.parse_expression(given_text)
    assert (value, sorted(leaves)) == expected
    solved = 1 if value == 24 else 0.35
    assert outcome == (solved if expected[1] == sorted(hand) else 0)


@settings(max_examples=500, deadline=None, database=None)
@given(st.text(st.characters()) | st.lists(st.sampled_from(PIECES), max_size=25).map("".join), st.booleans())
def test_any_text_has_a_score(completion, truncated):
    score(completion, truncated=truncated)


@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(st.integers(1, 13), min_size=4, max_size=4), st.integers(0, 40), st.randoms(use_true_random=False))
def test_random_reasoning(hand, lines, rng):
    """Right steps, repeats, wrong results, states never reached, and prose: the writer knows which is which."""
    reached, done, text = [tuple(sorted(map(Fraction, hand)))], set(), []
    for _ in range(lines):
        state = rng.choice([s for s in reached if len(s) > 1])
        a, b, *rest = rng.sample(state, len(state))
        sign = rng.choice("+-*/")
        flaw = rng.choice(["", "", "", "result", "state", "prose"])
        result = OPERATIONS[sign](a, b) if b or sign != "/" else Fraction(0)
        written = [*state[1:], 1000] if flaw == "state" else rng.sample(state, len(state))      # 1000 is out of reach
        step = f"{' '.join(map(str, written))} | {a} {sign} {b} = {result + (flaw == 'result')}"
        text.append("hm" if flaw == "prose" else step)
        if not flaw and (b or sign != "/"):
            done.add((state, sign, *(sorted((a, b)) if sign in "+*" else (a, b))))
            reached.append(tuple(sorted([result, *rest])))
    parts = score("<think>" + "\n".join(text) + f"</think>{ANSWER}", hand)
    assert parts["process"] == pytest.approx(len(done) / max(3, lines), abs=1e-12)
    assert parts["steps"] == lines


@pytest.mark.parametrize("text, value, leaves", [
    ("7", 7, [7]), ("0", 0, [0]), ("1 + 2 * 3 - 4 / 2", 5, [1, 2, 3, 4, 2]), ("8 - 4 - 2", 2, [8, 4, 2]),
    ("8 / 4 / 2 * 3", 3, [8, 4, 2, 3]), ("8 - ( 4 - 2 )", 6, [8, 4, 2]), ("8 / ( 3 - 8 / 3 )", 24, [8, 3, 8, 3]),
    ("1/3", Fraction(1, 3), [1, 3]), ("3 - 5", -2, [3, 5]), ("（8 × 3 ＋ 1）÷ 5 − 2", 3, [8, 3, 1, 5, 2]),
    ("20 + 4 = 24", 24, [20, 4]), ("1 + 1=24", 2, [1, 1]), (f"{10**50} - {10**50 - 1}", 1, [10**50, 10**50 - 1]),
    ("1\u3000+\n 2\u2028 * 3", 7, [1, 2, 3]), (" 20 + 4 =\n24 ", 24, [20, 4])], ids=short)
def test_parse_expression(text, value, leaves):
    assert reward.parse_expression(text) == (value, leaves)
    assert isinstance(reward.parse_expression(text)[0], Fraction)


@pytest.mark.parametrize("text", [
    "", " ", "= 24", "+", "()", "(", ")", "(1", "1)", "1 2", "1 (2)", "(1)(2)", "1 +", "* 1", "1 + * 2", "-1", "+1",
    "1 - -1", "01", "00", "0 1", "1.5", ".5", "1,5", "1e3", "1_0", "0x1", "２", "٢", "2²", "x", "2 ** 3", "7 // 2",
    "7 % 2", "2 ^ 3", "3!", "1 / 0", "1 / (2 - 2)", "0 / 0", "1 = 1", "1 == 24", "24 =", "24 = 24 = 24", "= 24 = 24",
    "[1]", "1;", "1 < 2", "1\0", "\ud800", "(" * 21 + "1" + ")" * 21, "1" * 201, "1" + "+1" * 100, "(" * 100_000,
    "-" * 199 + "1"], ids=short)
def test_parse_expression_refuses(text):
    with pytest.raises(ValueError):
        reward.parse_expression(text)


# Rows, tasks and the two outside interfaces


@pytest.mark.parametrize("row", [
    *({"numbers": numbers} for numbers in (
        None, 4, [], [4, 5, 6], [4, 5, 6, 10, 1], "4561", "4 5 6 10", ["4", "5", "6", "10"], [0, 5, 6, 10],
        [-4, 5, 6, 10], [True, 5, 6, 10], [4.0, 5, 6, 10], [4, 5, 6, None], [4, 5, 6, math.nan], [[4], 5, 6, 10],
        {4: 1, 5: 1, 6: 1, 10: 1})),
    *({"numbers": A, "target": target} for target in (None, 0, -24, 24.0, True, "24")),
    {}, None, 24, "4 5 6 10", [], A], ids=short)
def test_unusable_row(row):
    """None, which leaves the row out: neither 0 nor 1 would be true of the completion."""
    assert reward.score("game24", WHOLE, row) is None and reward.score("game24", "", row) is None
    with pytest.raises(ValueError):
        reward.check_row("game24", row)


@pytest.mark.parametrize("answer, outcome", [
    ("1 + 2 + 3 + 4", 1), ("1 + 2 + 3 + 4 = 10", 1), ("1 * 2 * 3 * 4", 0.35), ("1 + 2 + 3 + 4 = 24", 0)])
def test_target_of_the_row(answer, outcome):
    row = {"numbers": [1, 2, 3, 4], "target": 10}
    assert reward.score("game24", f"<think></think><answer>{answer}</answer>", row)["outcome"] == outcome


def test_unknown_task():
    with pytest.raises(ValueError, match="game24"):
        reward.score("game25", ANSWER, {"numbers": A})


TEXTS = [WHOLE, f"{THOUGHT}\n<answer>4 + 5 + 6 + 10</answer>", "", ANSWER]


@pytest.mark.parametrize("chat", [False, True])
def test_trl_signature(chat):
    completions = [[{"role": "assistant", "content": text}] for text in TEXTS] if chat else TEXTS
    rewards = reward.game24(prompts=["p"] * 4, completions=completions, numbers=[A] * 4, completion_ids=[[1]] * 4)
    assert rewards == [score(text)["reward"] for text in TEXTS]
    assert rewards[0] == pytest.approx(1) and rewards[2] == 0        # a zero is a reward, not a row to leave out


def test_trl_leaves_out_bad_rows():
    assert reward.game24(["p"] * 4, [""] * 4, [A, [4, 5, 6], None, "4 5 6 10"]) == [0, None, None, None]


def test_trl_target_column():
    """Columns may be arrays; pandas turns a column of integers with a missing one into floats with a NaN."""
    text = "<think>\n4 + 5 = 9\n9 + 6 = 15\n15 + 10 = 25\n</think>\n<answer> 4 + 5 + 6 + 10 </answer>"
    wrong = score(text)["reward"]
    for targets in ([25, 24, None], numpy.array([25, 24, math.nan]), numpy.array([25, 24.0, None], dtype=object)):
        for numbers in ([A] * 3, numpy.array([A] * 3)):
            rewards = reward.game24(["p"] * 3, [text] * 3, numbers, target=targets)
            assert rewards == [pytest.approx(1), wrong, wrong] and wrong < 0.5
    assert reward.game24(["p"], [text], [A], target=[24.5]) == [None]


@pytest.mark.parametrize("truth", [
    A, tuple(A), json.dumps(A), {"numbers": A}, json.dumps({"numbers": A, "id": "x"}), numpy.array(A),
    {"numbers": numpy.array(A)}, {"numbers": A, "target": None}, {"numbers": A, "target": math.nan},
    {"numbers": numpy.array(A), "target": 24.0}, json.dumps({"numbers": A, "target": None})], ids=short)
def test_verl_signature(truth):
    for text in TEXTS:
        result = reward.compute_score("game24", solution_str=text, ground_truth=truth, extra_info={"index": 0})
        parts = score(text)
        assert result == {"score": parts.pop("reward"), "acc": parts["correct"], **parts}
        assert all(type(value) is float for value in result.values())


def test_verl_on_another_task(monkeypatch):
    parts = {"reward": 0.5, "correct": 1.0, "answered": 1.0}
    monkeypatch.setitem(reward.TASKS, "other", (lambda row: None, lambda completion, row, truncated: dict(parts)))
    assert reward.compute_score("other", "", {}) == {"score": 0.5, "acc": 1, "correct": 1, "answered": 1}


@pytest.mark.parametrize("truth", [
    None, 24, [], [4, 5, 6], ["4", "5", "6", "10"], {}, {"numbers": None},
    "", "24", "null", "4 5 6 10", "[4, 5, 6]", "{}", "["], ids=short)
def test_verl_unusable_ground_truth(truth):
    with pytest.raises(ValueError):
        reward.compute_score("game24", WHOLE, truth)


# Threads and time


@pytest.mark.parametrize("completion", [
    f"{THOUGHT}<answer>{'(' * 100_000}</answer>", f"{THOUGHT}<answer>{'9' * 100_000}</answer>",
    f"{THOUGHT}<answer>{'9**' * 33_000}9</answer>", f"{THOUGHT}<answer>{RIGHT}{' ' * 100_000}= 25</answer>",
    f"{THOUGHT}{ANSWER}{' ' * 100_000}x", f"{THOUGHT}{'<answer>' * 12_500}", "（" * 100_000, " " * 100_000,
    f"<think>{chr(10) * 100_000}</think>{ANSWER}", "<think>" * 14_000, "</think>" * 12_500,
    f"<think>{'<' * 100_000}</think>{'<' * 1000}", f"<think>\n{STEPS}\n{'1 ' * 50_000}\n</think>{ANSWER}",
    f"<think>\n{'1/1 ' * 49}\n{'1/' * 50_000}\n</think>{ANSWER}",
    f"<think>\n{STEPS}\n" + ("(1+" * 65 + "\n") * 500 + f"</think>{ANSWER}",
    "<think>\n" + "10 - 6 = 4\n" * 9_000 + f"</think>{ANSWER}",
    f"<think>\n{STEPS}\n" + f"{RIGHT}\n" * 5_000 + f"</think>{ANSWER}"], ids=range(17))
def test_time_is_bounded(completion):
    """Generous, for a busy machine: only a quadratic blow-up fails."""
    assert min(timeit.repeat(lambda: score(completion), number=1, repeat=5)) < 0.1


def test_same_verdicts_from_threads():
    texts = [f"<think>\n{'10 - 6 = 4' * (n % 3)}\n{STEPS[:n % 40]}\n</think>{TEXTS[n % 4]}" for n in range(400)] + TEXTS
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(score, texts)) == [score(text) for text in texts]
