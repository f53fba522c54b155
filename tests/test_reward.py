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
from fractions import Fraction
from itertools import combinations_with_replacement

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_prep
import reward

A, B = [4, 5, 6, 10], [3, 3, 8, 8]     # B has no solution without fractions
RIGHT = "5 * ( 10 - 6 ) + 4"
STEPS = "10 - 6 = 4\n5 * 4 = 20\n20 + 4 = 24"
THOUGHT = f"<think>\n{STEPS}\n</think>"
ANSWER = f"<answer>{RIGHT}</answer>"
WHOLE = f"{THOUGHT}\n{ANSWER}"
DEEP = "(" * 20 + "5" + ")" * 20 + " * ( 10 - 6 ) + 4"
LONG = RIGHT.replace(" + ", " " * (200 - len(RIGHT) + 1) + "+ ")       # 200 characters


def short(value):
    return ascii(value)[:40]


def score(completion, numbers=A, **kwargs):
    """The parts of the reward, after a check of what holds for every completion."""
    parts = reward.score("game24", completion, {"numbers": numbers}, **kwargs)
    assert all(0 <= parts[part] <= 1 for part in ("reward", "outcome", "process", "length"))
    total = 0.55 * parts["outcome"] + 0.30 * parts["process"] + 0.15 * parts["length"]
    assert parts["reward"] == pytest.approx(total, abs=1e-12)
    assert parts["outcome"] in (0, 0.35, 1) and parts["correct"] == (parts["outcome"] == 1)
    assert parts["answered"] in (0, 1) and parts["answered"] >= (parts["outcome"] > 0)
    pays = parts["outcome"] == 1 or (parts["outcome"] > 0 and not reward.LENGTH_NEEDS_CORRECT)
    assert (parts["length"] > 0) == pays
    return parts


# The answer: what stands between <answer> and </answer>
ANSWERS = [     # numbers, outcome, answers
    (A, 1, [RIGHT, "((((5)*((10-6)))+(4)))", "5 × ( 10 − 6 ) + 4", "（5＊（10－6））＋4", DEEP, LONG, f"{RIGHT}=24",
            "5\u3000*\n(10\u2028- 6) + 4 =\n24 "]),
    (B, 1, ["8 / ( 3 - 8 / 3 )", "8 ÷ ( 3 − 8 ÷ 3 )"]),       # 23.999999999999989 in floating point
    (A, 0.35, ["4 + 5 + 6 + 10", "5 * ( 6 - 10 ) - 4", "4 + 5 + 6 + 10 = 24", "4 * 6 + 5 / 10"]),
    (B, 0.35, ["8 * 3 + 3 / 8"]),
    # too deep, too long, divided by zero
    (A, 0, [f"({DEEP.replace(' * ', ') * ', 1)}", LONG.replace("5 *", "5  *"), "4 + 5 / ( 10 - 10 )"]),
    # equals; the four numbers, each once
    (A, 0, ["4 + 5 + 6 + 10 = 25", f"24 = {RIGHT}", "( 5 * ( 10 - 6 ) + 4 = 24 )", "", "24", "4 * ( 10 - 4 )",
            "5 * ( 10 - 6 ) + 3 + 1", "4 * 6 + 5 * 0 * 1", *(RIGHT + end for end in (
                " = 25", " = 24 = 24", " == 24", " =", " = 024", " = 24.0", " = 2 4", " * 1", f" {RIGHT}"))]),
    # numbers that are not ASCII integers; int() of more than 4300 digits raises
    (A, 0, ["5 * ( 1 0 - 6 ) + 4", "5 * ( 1\n0 - 6 ) + 4", "5 * ( 010 - 6 ) + 4", "5.0 * ( 10 - 6 ) + 4",
            "5 * ( 1_0 - 6 ) + 4", "5 * ( 0xA - 6 ) + 4", "5 * ( 1e1 - 6 ) + 4", "5 * ( 1０ - 6 ) + 4",
            "٥ * ( ١٠ - 6 ) + 4", "5 * ( 10 - 6 ) + ④", "五 * ( 10 - 6 ) + 4", "9" * 150, "9" * 5000]),
    # other operators, some of them 24 in Python
    ([1, 2, 3, 3], 0, ["2³ * 3 * 1", "2 ** 3 * 3 * 1", "2 * * 3 * 3 * 1", "2 ^ 3 * 3 * 1"]),
    ([9, 9, 9, 9], 0, ["9**9**9**9"]),
    ([1, 1, 2, 49], 0, ["49 // 2 * 1 * 1"]),
    (A, 0, ["10 % 6 * 5 + 4", "- ( 6 - 10 ) * 5 + 4", "5 * ( 10 + -6 ) + 4", "5 * ( 10 - 6 ) - -4", f"+{RIGHT}",
            "5 ( 10 - 6 ) + 4", "5 x ( 10 - 6 ) + 4", "5 * ( 10 – 6 ) + 4", f"* {RIGHT}", f"{RIGHT} +"]),
    # brackets, and more than an expression
    (A, 0, [f"( {RIGHT}", f"{RIGHT} )", f"{RIGHT} ( )", ") 5 * 10 - 6 + 4 (", "5 * [ 10 - 6 ] + 4", "(" * 200,
            "abs( 6 - 10 ) * 5 + 4", "__import__('os').getpid()", f"{RIGHT} # 1", f"{RIGHT}; 24", f"'{RIGHT}'",
            f"The answer is {RIGHT}", f"\\boxed{{{RIGHT}}}", f"<b>{RIGHT}</b>", f"<answer>{RIGHT}</answer>",
            f"<think></think>{RIGHT}", f"{RIGHT} < 25", f"{RIGHT}\0", f"{RIGHT}\ud800", f"{RIGHT}\u200b"])]


@pytest.mark.parametrize("numbers, answer, outcome", [
    (numbers, answer, outcome) for numbers, outcome, answers in ANSWERS for answer in answers], ids=short)
def test_answer(numbers, answer, outcome):
    parts = score(f"<think>\n</think>\n<answer>{answer}</answer>", numbers)
    assert (parts["outcome"], parts["process"]) == (outcome, 0)      # no step is no process reward, whatever the answer


# The frame: think, then one answer, then the end
FRAMES = [      # outcome, process, answered (None: the rules leave it open), completions
    (1, 1, 1, [WHOLE, WHOLE.replace("\n", "\r\n"), f"\n{STEPS}\n</think>\n{ANSWER}"]),   # a template opened the thought
    (0, 1, 1, [f"{THOUGHT}\n<answer></answer>"]),
    (0, 0, 0, [ANSWER, "", "<|endoftext|>" * 5_000, "<think>", "</think>", "\ud800\udfff" * 50]),
    (0, 3 / 4, 0, [f"<think>\n{STEPS}\n{ANSWER}", f"<think>\n{STEPS}\n{ANSWER}\n</think>"]),
    (0, 3 / 4, None, [f"<think>\n{STEPS}\n{ANSWER}\n</think>\n{ANSWER}", f"<think>\n{WHOLE}",
                      f"<think>\n{STEPS}\n<answer>\n</think>\n{ANSWER}"]),
    (0, 1, 0, [f"{ANSWER}\n{THOUGHT}", f"{THOUGHT}\n{RIGHT}", f"{THOUGHT}\n<answer>{RIGHT}",
               f"{THOUGHT}\n{RIGHT}</answer>", f"{THOUGHT}\n< answer >{RIGHT}</ answer >"]),
    # two answers or thoughts, and text around; EOS is a token, which decoding drops
    (0, 1, None, [f"{ANSWER}\n{WHOLE}", f"{THOUGHT}\n{WHOLE}", f"Sure!\n{WHOLE}", f"{THOUGHT}\nSo:\n{ANSWER}",
                  f"{THOUGHT}\n</answer>{RIGHT}<answer>", f"{THOUGHT}\n</think>\n{ANSWER}",
                  f"{THOUGHT}\n<answer>4</answer>\n{ANSWER}", f"{THOUGHT}\n<answer id=1>{RIGHT}</answer>",
                  *(WHOLE + end for end in (f"\n{ANSWER}", "\n<answer>", "\n</think>", f"\n{THOUGHT}", "\nDone.",
                                            " ok" * 30_000, "<|im_end|>", "\0"))])]


@pytest.mark.parametrize("completion, outcome, process, answered", [
    (completion, *verdict) for *verdict, completions in FRAMES for completion in completions], ids=short)
def test_frame(completion, outcome, process, answered):
    parts = score(completion)
    assert (parts["outcome"], parts["process"]) == (outcome, process)
    assert answered is None or parts["answered"] == answered


def test_truncated_is_not_answered():
    parts = score(WHOLE, truncated=True)
    assert (parts["outcome"], parts["process"], parts["length"], parts["answered"]) == (0, 1, 0, 0)


# The steps
REASONING = [       # numbers, right steps, divisor, reasonings
    (A, 3, 3, [STEPS, STEPS.replace("\n", "\r\n"), STEPS.replace("\n", "\n\n \n"),
               "10 4 6 5 | 10 - 6 = 4\n5 4 4 | 5 * 4 = 20\n4 20 | 20 + 4 = 24",
               "6 - 10 = -4\n-4 4 5 | -4 + 4 = 0\n0 5 | 0 * 5 = 0",
               "| 10 - 6 = 4\n4 4 5 | 5 - 4 = 1\n|10 - 4 = 6"]),                 # a bare | is the given numbers
    (A, 4, 4, [f"{STEPS}\n4 5 6 10 | 10 + 5 = 15"]),
    (A, 2, 3, ["10 - 6 = 4\n6 - 10 = -4", "10 - 6 = 4\n4 5 6 10 | 5 - 4 = 1\n4 1 | 4 * 1 = 4",   # joins two branches
               "5 * 4 = 20\n20 + 4 = 24\n10 - 6 = 4"]),                   # the 4 of the first step is the hand's
    # 1 4 6, reached again, is the latest state
    ([1, 1, 4, 6], 5, 5, ["4 / 1 = 4\n1 1 4 6 | 6 - 1 = 5\n1 1 4 6 | 6 / 1 = 6\n4 + 1 = 5\n6 * 5 = 30"]),
    (B, 3, 3, ["3 3 8 8 | 8 / 3 = 8/3\n8/3 3 8 | 3 - 8/3 = 1/3\n1/3 8 | 8 / 1/3 = 24",
               "8 / 3 = 8/3\n3 - 8/3 = 1/3\n8 / 1/3 = 24\n8 / ( 3 - 8 / 3 )"]),
    # repeats
    (A, 1, 3, ["10 + 6 = 16\n6 + 10 = 16\n4 5 6 10 | 10 + 6 = 16",
               "10 - 6 = 4\n4 5 6 10 | 10 - 6 = 4\n10 6 5 4 | 10 - 6 = 4", "| 10 - 6 = 4\n4 5 6 10 | 10 - 6 = 4",
               "10 - 6 = 4\n| 5 * 4 = 21\n| 4 + 4 = 8"]),           # 4 + 4 stands in 4 4 5, not in the given numbers
    (A, 1, 5000, ["\n".join(["10 - 6 = 4"] * 5000)]),
    (B, 1, 3, ["3 3 8 8 | 8 / 3 = 8/3\n3 3 8 8 | 8 / 3 = 16/6"]),
    ([1, 1, 4, 6], 3, 4, ["4 / 1 = 4\n1 4 6 | 6 - 4 = 2\n1 1 4 6 | 6 / 1 = 6\n1 4 6 | 6 - 4 = 2"]),
    # operands and states that were never reached, wrong arithmetic
    (A, 0, 3, ["", "7 + 8 = 15", "5 * 5 = 25", "4 4 5 | 5 * 4 = 20", "10 - 6 = 3\n4 * 3 = 12", "6 - 10 = 4",
               "4 5 6 11 | 10 - 6 = 4", "6 10 | 10 - 6 = 4", "4 4 5 6 10 | 10 - 6 = 4", "10 - 06 = 4\n10 - 6 = 04",
               "4 ** 5 = 1024\n4 ^ 5 = 1024", "10 // 4 = 2\n10 % 4 = 2", "١٠ - ٦ = ٤",
               f"10 - 6 = {'9' * 5000}\n{'1' * 5000} - 6 = 4", f"10 + 6 = 24\n{RIGHT}"]),
    (A, 1, 3, ["4 5 6 10 | 10 - 6 = 4\n4 4 5 | 10 - 5 = 5", "4 4 5 | 5 * 4 = 20\n4 5 6 10 | 10 - 6 = 4",
               "10 / 4 = 2.5\n10 / 4 = 5/2"]),
    (B, 1, 3, ["8 + 8 = 16\n16 + 8 = 24", "8 - 8 = 0\n0 3 3 | 3 / 0 = 0\n0 3 3 | 3 / 0 = 3"]),
    (B, 0, 3, ["8 / 3 = 2.667", "8 / 3 = 2\n8 / 3 = 3", "8 / 3 = 8/0"]),
    # what a line is
    (A, 0, 3, ["10 - 6 = 4, 5 * 4 = 20", "10 - 6 = 4 * 5 = 20 + 4 = 24", "10 - 6 + 4 = 8", "10 - 6 = 4 (good)",
               STEPS.replace("\n", "\u2028"), STEPS.replace("\n", "\r"), "**10 - 6 = 4**", "10 - 6\n10 - 6 =",
               "- 10 - 6 = 4\n1. 10 - 6 = 4\n* 10 - 6 = 4", "4 = 10 - 6", "4 5 6 10 |", "|",
               "|| 10 - 6 = 4", "10 - 6 = 4\0"]),
    (A, 3, 5, [f"{STEPS}\nFound it!\n24", f"{STEPS}\n24 | 24 + 0 = 24\n24 | 24 * 1 = 24"]),
    (A, 0, 203, ["hm\n" * 200 + STEPS]),      # lines beyond the limit count as wrong
    # composing the answer
    (A, 3, 3, [f"{STEPS}\n20 + 4\n( 5 * 4 ) + 4\n( 5 * ( 10 - 6 ) ) + 4", f"{STEPS}\n{RIGHT}"]),
    (A, 3, 4, [f"{RIGHT}\n{STEPS}", f"{STEPS}\n( 5 * 4 ) + 4\n4 + 4 * 5", f"{STEPS}\n5 * 4 + 5",
               f"{STEPS}\n2 ** 3 * 3", f"{STEPS}\n20 + 4 + 00"])]


@pytest.mark.parametrize("numbers, right, divisor, lines", [
    (*verdict, lines) for *verdict, reasonings in REASONING for lines in reasonings], ids=short)
def test_steps(numbers, right, divisor, lines):
    answer = {tuple(A): RIGHT, tuple(B): "8 / ( 3 - 8 / 3 )"}.get(tuple(numbers), "6 / ( 1 / 4 ) / 1")
    parts = score(f"<think>\n{lines}\n</think>\n<answer>{answer}</answer>", numbers)
    assert parts["process"] == pytest.approx(right / divisor, abs=1e-12)
    assert parts["outcome"] == 1, "whatever the reasoning"


@pytest.mark.parametrize("lines, expected", [       # 1/(1+e^-3.8), 1/2, 1/(1+e^4)
    (0, 1), (4, 1), (5, 0.9781187290638694), (24, 0.5), (44, 0.01798620996209156), (10_000, 0)])
def test_length_counts_lines_of_reasoning(lines, expected):
    for text in ("hm\n" * lines, "\n" + "hm\n\n" * lines):        # blank lines neither pay nor cost
        assert score(f"<think>{text}</think>{ANSWER}")["length"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("needs_correct", [0, 1])
def test_length_is_paid_for_a_finished_answer(monkeypatch, needs_correct):
    """In a group of wrong answers a length reward becomes a full-size advantage, hence the constant."""
    monkeypatch.setattr(reward, "LENGTH_NEEDS_CORRECT", needs_correct)
    assert score("<think></think><answer>4 + 5 + 6 + 10</answer>")["length"] == 1 - needs_correct
    for completion in ("", "<think></think><answer>24</answer>", "<think></think>", f"<think>\n{ANSWER}"):
        for well_formed in (0.35, 0.0):
            monkeypatch.setattr(reward, "WELL_FORMED", well_formed)
            assert score(completion)["length"] == 0


def by_python(text):
    """Value and sorted numbers by `eval`; None for more than whole numbers, + - * / between them, and brackets."""
    if re.search(r"[^-+*/() 0-9]|\*\*|//|(^|[-+*/(]) *[-+]|(?<![0-9])0[0-9]", text):
        return None, []
    try:
        value = eval(re.sub("[0-9]+", r"Fraction(\g<0>)", text).strip())
    except (SyntaxError, TypeError, ZeroDivisionError):
        return None, []
    return value if isinstance(value, Fraction) else None, sorted(map(int, re.findall("[0-9]+", text)))


def test_answers_with_another_character():
    """A changed answer earns what Python says, mostly nothing."""
    rng = random.Random(0)
    for hand in rng.sample(list(combinations_with_replacement(range(1, 14), 4)), 400):
        if not reward.solvable(hand, 24):
            continue
        answer = data_prep.write_trace(hand, 24, rng).partition("<answer>")[2].removesuffix("</answer>")
        answer = answer.replace(rng.choice([" ", "none"]), "")
        for _ in range(3):
            place, put = rng.randrange(len(answer) + 1), rng.choice([*"0123456789+-*/() ", *[""] * 9])
            changed = answer[:place] + put + answer[place + rng.randrange(2):]
            outcome = score(f"<think></think><answer>{changed}</answer>", hand)["outcome"]
            value, leaves = by_python(changed)
            if value is None:
                assert outcome == 0, changed
                with pytest.raises(ValueError):
                    reward.parse_expression(changed)
            else:
                found, numbers = reward.parse_expression(changed)
                assert (found, sorted(numbers)) == (value, leaves) and isinstance(found, Fraction)
                assert outcome == (leaves == list(hand)) * (1 if value == 24 else 0.35), changed


OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
PIECES = ["<think>", "</think>", "<answer>", "</answer>", STEPS, RIGHT, "4 5 6 10 | ", "10 - 6 = 4", "24", "8/3",
          *"=|-()\n 0²\0\u2028\ud800"]


@settings(max_examples=500, deadline=None, database=None)
@given(st.text(st.characters()) | st.lists(st.sampled_from(PIECES), max_size=25).map("".join), st.booleans())
def test_any_text_has_a_score_and_a_reward_for_each_line(completion, truncated):
    score(completion, truncated=truncated)
    of_lines = reward.LINE_REWARDS["game24"](completion, {"numbers": A})
    assert len(of_lines) == len(completion.split("\n")) and {-1, 0, 1} >= {x for x in of_lines if x == x}


@settings(max_examples=200, deadline=None, database=None)
@given(st.integers(0, 2**32))
def test_random_reasoning(seed):
    """Right steps, repeats, wrong results, states never reached, and prose: the writer knows which is which."""
    rng = random.Random(seed)
    hand, lines = rng.choices(range(1, 14), k=4), rng.randint(0, 40)
    reached, done, text = [tuple(sorted(map(Fraction, hand)))], set(), []
    for _ in range(lines):
        state = rng.choice([s for s in reached if len(s) > 1])
        a, b, *rest = rng.sample(state, len(state))
        sign = rng.choice("+-*/")
        flaw = rng.choice(["", "", "", "result", "state", "prose"])
        result = OPERATIONS[sign](a, b) if b or sign != "/" else Fraction(0)
        written = [*state[1:], 1000] if flaw == "state" else rng.sample(state, len(state))      # 1000 is out of reach
        written = "" if not flaw and len(state) == 4 and rng.random() < 0.5 else " ".join(map(str, written))
        step = f"{written} | {a} {sign} {b} = {result + (flaw == 'result')}"
        text.append("hm" if flaw == "prose" else step)
        if not flaw and (b or sign != "/"):
            done.add((state, sign, *(sorted((a, b)) if sign in "+*" else (a, b))))
            reached.append(tuple(sorted([result, *rest])))
    parts = score("<think>" + "\n".join(text) + f"</think>{ANSWER}", hand)
    assert parts["process"] == pytest.approx(len(done) / max(3, lines), abs=1e-12)
    assert parts["steps"] == lines


@pytest.mark.parametrize("row", [
    *({"numbers": numbers} for numbers in (
        None, [4, 5, 6], "4561", ["4", "5", "6", "10"], [0, 5, 6, 10], [True, 5, 6, 10], [4.0, 5, 6, 10],
        [4, 5, 6, math.nan], [[4], 5, 6, 10], {4: 1, 5: 1, 6: 1, 10: 1})),
    *({"numbers": A, "target": target} for target in (None, 0, 24.0, "24")), {}, None, 24, A], ids=short)
def test_unusable_row(row):
    """None, which leaves the row out: neither 0 nor 1 would be true of the completion."""
    assert reward.score("game24", WHOLE, row) is None
    with pytest.raises(ValueError):
        reward.prompt("game24", row)


TEXTS = [WHOLE, f"{THOUGHT}\n<answer>4 + 5 + 6 + 10</answer>", "", ANSWER]


def test_trl_signature():
    chats = [[{"role": "assistant", "content": text}] for text in TEXTS]
    for completions in (TEXTS, chats):
        rewards = reward.game24(prompts=["p"] * 4, completions=completions, numbers=[A] * 4, completion_ids=[[1]] * 4)
        assert rewards == [score(text)["reward"] for text in TEXTS]
    # a zero is a reward, not a row to leave out
    assert reward.game24(["p"] * 4, [""] * 4, [A, [4, 5, 6], None, "4 5 6 10"]) == [0, None, None, None]


def test_trl_target_column():
    """Columns may be arrays; pandas turns a column of integers with a missing one into floats with a NaN."""
    text = "<think>\n4 + 5 = 9\n9 + 6 = 15\n15 + 10 = 25\n</think>\n<answer> 4 + 5 + 6 + 10 = 25 </answer>"
    wrong = score(text)["reward"]
    for targets in ([25, 24, None], numpy.array([25, 24, math.nan]), numpy.array([25, 24.0, None], dtype=object)):
        rewards = reward.game24(["p"] * 3, [text] * 3, numpy.array([A] * 3), target=targets)
        assert rewards == [pytest.approx(1), wrong, wrong] and wrong < 0.5
    assert reward.game24(["p"], [text], [A], target=[24.5]) == [None]


@pytest.mark.parametrize("truth", [
    A, json.dumps(A), {"numbers": A}, json.dumps({"numbers": A, "id": "x"}), numpy.array(A),
    {"numbers": numpy.array(A), "target": 24.0}, {"numbers": A, "target": math.nan},
    json.dumps({"numbers": A, "target": None})], ids=short)
def test_verl_signature(truth):
    for text in TEXTS:
        result = reward.compute_score("game24", solution_str=text, ground_truth=truth, extra_info={"index": 0})
        parts = score(text)
        assert result == {"score": parts.pop("reward"), "acc": parts["correct"], **parts}
        assert all(type(value) is float for value in result.values())


@pytest.mark.parametrize("task, truth", [
    ("game25", A), *(("game24", truth) for truth in (None, 24, [4, 5, 6], {}, "", "null", "[4, 5, 6]"))], ids=short)
def test_verl_unusable_ground_truth(task, truth):
    with pytest.raises((ValueError, KeyError), match="game25|numbers must be|Expecting value"):
        reward.compute_score(task, WHOLE, truth)


@pytest.mark.parametrize("completion", [
    f"{THOUGHT}<answer>{'(' * 100_000}</answer>", f"{THOUGHT}<answer>{'9**' * 33_000}9</answer>",
    f"{THOUGHT}{ANSWER}{' ' * 100_000}x", f"{THOUGHT}{'<answer>' * 12_500}", f"<think>{'<' * 100_000}</think>",
    f"<think>{chr(10) * 100_000}</think>{ANSWER}", f"<think>\n{STEPS}\n{'1 ' * 50_000}\n</think>{ANSWER}",
    f"<think>\n{'1/1 ' * 49}\n{'1/' * 50_000}\n</think>{ANSWER}",
    f"<think>\n{STEPS}\n" + ("(1+" * 65 + "\n") * 500 + f"</think>{ANSWER}",
    "<think>\n" + "10 - 6 = 4\n" * 9_000 + f"</think>{ANSWER}",
    f"<think>\n{STEPS}\n" + f"{RIGHT}\n" * 5_000 + f"</think>{ANSWER}"], ids=range(11))
def test_time_is_bounded(completion):
    """Generous, for a busy machine: only a quadratic blow-up fails."""
    assert min(timeit.repeat(lambda: score(completion), number=1, repeat=5)) < 0.1


def test_line_rewards_by_hand():
    lines = {"Hm": None, "<think>": None, "4 5 6 10 | 10 - 4 = 6": 1, "6 5 6 | 6 * 5 = 30": 1, "30 6 | 30 + 6 = 36": 0,
             "6 5 6 | 6 * 5 = 30 ": -1, "30 6 | 30 - 6 = 25": -1, "7 7 | 7 + 7 = 14": -1, "": None, "hm": -1,
             "( 6 * 5 ) - 6": -1, "30 6 | 30 - 6 = 24": 1, "( 6 * 5 ) - 6 ": 1, "</think>": None,
             "<answer> ( 5 * ( 10 - 4 ) ) - 6 </answer>": None}
    completion, row = "\n".join(lines), {"numbers": [4, 5, 6, 10]}
    found = reward.LINE_REWARDS["game24"](completion, row)
    assert [None if math.isnan(value) else value for value in found] == list(lines.values())
    opened = reward.LINE_REWARDS["game24"](completion.removeprefix("Hm\n<think>\n"), row)        # by a chat template
    assert str(opened) == str(found[2:])
