"""The task contract: prompt, parser and rewards. Every other script imports this file; it imports only the standard library.

A whole example (`python -m doctest reward.py` checks it):

>>> completion = '''<think>
... 4 10 6 5 | 10 + 4 = 14
... 4 10 6 5 | 10 - 6 = 4
... 4 4 5 | 5 * 4 = 20
... 20 4 | 20 + 4 = 24
... ( 5 * 4 ) + 4
... </think>
... <answer> ( 5 * ( 10 - 6 ) ) + 4 </answer>'''
>>> row = {"numbers": [4, 5, 6, 10]}
>>> round(score("game24", completion, row)["reward"], 4)     # 0.55 * 1 + 0.30 * 4/4 + 0.15 / (1 + exp(0.2 * (5 - 4 - 20)))
0.9967
>>> round(score("game24", completion.replace("6 ) ) + 4", "6 ) ) + 5"), row)["reward"], 4)     # 5 twice: the steps alone
0.3

A line of reasoning is a step, `state | a op b = c` (the state may be left out), or it composes the answer: after a step has
reached the target, an expression of that value with more numbers than the composing line before it. Any other line is wrong.
"""

import json
import math
import re
from fractions import Fraction

OUTCOME_WEIGHT = 0.55        # the total is the weighted sum of these three (report on the 24-point game)
PROCESS_WEIGHT = 0.30
LENGTH_WEIGHT = 0.15
WELL_FORMED = 0.35           # outcome of an expression over exactly the four numbers with another value
LENGTH_NEEDS_CORRECT = 1     # 1: the length reward is paid for right answers only; 0: for every well-formed one
MIN_STEPS = 3                # least divisor of the process reward: a solution has three steps
MAX_EXPRESSION_CHARS = 200   # a longer expression or line is refused, which bounds the time of any input
MAX_EXPRESSION_DEPTH = 20    # nested brackets
MAX_LINES = 200              # lines of reasoning that are read; each further one counts as wrong

OPERATORS = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__, "/": Fraction.__truediv__}
OTHER_SIGNS = str.maketrans("×÷−＋－＊／（）＝", "*/-+-*/()=")
VALUE = r"-?(?:0|[1-9][0-9]{0,8})(?:/[1-9][0-9]{0,8})?"       # in a step: an integer, or a fraction such as 8/3
STEP = re.compile(rf"(?:({VALUE}(?:[ ,]+{VALUE}){{0,3}}) ?\| ?)?({VALUE}) ?([-+*/]) ?({VALUE}) ?= ?({VALUE})")


def parse_expression(text: str, target: int = 24) -> tuple[Fraction, list[int]]:
    """Value of an arithmetic expression and its leaves in order, by one grammar for both.

    ASCII integers without leading zeros, + - * / (also × ÷ − and full-width forms) and brackets; a trailing `= target`
    is allowed. No unary minus, no powers, no concatenation. Raises ValueError on all else and on division by zero.
    """
    if len(text) > MAX_EXPRESSION_CHARS:
        raise ValueError(f"expression of {len(text)} characters, at most {MAX_EXPRESSION_CHARS} are read")
    text = re.sub(rf"\s*=\s*{target}\s*\Z", "", text.translate(OTHER_SIGNS))
    tokens = re.findall(r"[1-9][0-9]*|\S", text) + ["the end"]
    leaves, position = [], 0

    def take() -> str:
        nonlocal position
        position += 1
        return tokens[position - 1]

    def operand(depth: int) -> Fraction:
        token = take()
        if token == "(" and depth < MAX_EXPRESSION_DEPTH:
            value = terms(depth + 1)
            if take() != ")":
                raise ValueError(f"bracket not closed in {text!r}")
            return value
        if not (token.isascii() and token.isdigit()):
            raise ValueError(f"number expected, not {token!r}, in {text!r}")
        leaves.append(int(token))
        return Fraction(leaves[-1])

    def chain(part, operators: str, depth: int) -> Fraction:
        value = part(depth)
        while tokens[position] in operators:
            operator, right = take(), part(depth)
            if operator == "/" and right == 0:
                raise ValueError(f"division by zero in {text!r}")
            value = OPERATORS[operator](value, right)
        return value

    def factors(depth: int) -> Fraction:
        return chain(operand, "*/", depth)

    def terms(depth: int) -> Fraction:
        return chain(factors, "+-", depth)

    value = terms(0)
    if take() != "the end":
        raise ValueError(f"unexpected {tokens[position - 1]!r} in {text!r}")
    return value, leaves


def valid_row(row: dict) -> tuple[list[int], int]:
    """The four positive integers and the target (24 if the row has none). Raises ValueError with what is there instead."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, not {type(row).__name__}")
    numbers, target = row.get("numbers"), row.get("target", 24)
    if not isinstance(numbers, (list, tuple)) or len(numbers) != 4 or any(type(n) is not int or n < 1 for n in numbers):
        raise ValueError(f"numbers must be a list of four positive integers, not {numbers!r}")
    if type(target) is not int or target < 1:
        raise ValueError(f"target must be a positive integer, not {target!r}")
    return numbers, target


def length_reward(lines: int, threshold: int = 4, midpoint: int = 20, steepness: float = 0.2) -> float:
    """1 up to `threshold` lines of reasoning, then a falling sigmoid (report on the 24-point game, eq. 5)."""
    return 1.0 if lines <= threshold else 1 / (1 + math.exp(min(steepness * (lines - threshold - midpoint), 700)))


def check_steps(lines: list[str], numbers: list[int], target: int) -> tuple[int, int]:
    """(right steps, step lines and wrong lines) of the reasoning.

    A step is right if its arithmetic holds, its operands are in a state reached before (the given numbers, or what a
    right step made of such a state) and it repeats no earlier step. Without a state of its own a step starts from the
    latest state that holds its operands. Composing lines count as neither.
    """
    states = {tuple(sorted(map(str, numbers))): None}     # a dict keeps the order in which they were reached
    done, right, counted, composed = set(), 0, max(0, len(lines) - MAX_LINES), 1
    for line in lines[:MAX_LINES]:
        line = line.strip().translate(OTHER_SIGNS)
        step = STEP.fullmatch(line) if len(line) <= MAX_EXPRESSION_CHARS else None
        if step is None and (str(target),) in states and sum(map(line.count, OPERATORS)) < len(numbers):
            try:
                value, leaves = parse_expression(line, target)
            except ValueError:
                value, leaves = None, []
            if value == target and composed < len(leaves) <= len(numbers):
                composed = len(leaves)
                continue
        counted += 1
        if step is None:
            continue
        given, a, operator, b, result = step.groups()
        a, b, result = Fraction(a), Fraction(b), Fraction(result)
        operands = sorted((str(a), str(b)))
        candidates = reversed(states) if given is None else [tuple(sorted(str(Fraction(v)) for v in re.split("[ ,]+", given)))]
        state = next((s for s in candidates if s in states and all(s.count(v) >= operands.count(v) for v in operands)), None)
        key = (state, operator, *(operands if operator in "+*" else (str(a), str(b))))
        if state is None or key in done or (operator == "/" and b == 0) or OPERATORS[operator](a, b) != result:
            continue
        done.add(key)
        right += 1
        made = list(state)
        for value in operands:
            made.remove(value)
        made = tuple(sorted([*made, str(result)]))
        states.pop(made, None)
        states[made] = None
    return right, counted


def score_game24(completion: str, row: dict, truncated: bool) -> dict[str, float]:
    numbers, target = row["numbers"], row.get("target", 24)
    before, opened, body = completion.partition("<think>")
    thought, closed, rest = (body if opened else completion).partition("</think>")     # a chat template may have opened it
    lines = [line for line in thought.split("\n") if line.strip()]
    right, counted = check_steps(lines, numbers, target)
    answered = bool(closed and "<answer>" in rest and "</answer>" in rest and not truncated)
    answer = re.fullmatch(r"\s*<answer>([^<>]*)</answer>\s*", rest)
    outcome = 0.0
    if answered and answer and not re.search(r"<(think|answer)>|</answer>", thought) and not (opened and before.strip()):
        try:
            value, leaves = parse_expression(answer[1], target)
            if sorted(leaves) == sorted(numbers):
                outcome = 1.0 if value == target else WELL_FORMED
        except ValueError:
            pass
    process = right / max(MIN_STEPS, counted)
    length = length_reward(len(lines)) if outcome >= (1 if LENGTH_NEEDS_CORRECT else WELL_FORMED) else 0.0
    reward = OUTCOME_WEIGHT * outcome + PROCESS_WEIGHT * process + LENGTH_WEIGHT * length
    return {"reward": reward, "outcome": outcome, "process": process, "length": length, "correct": float(outcome == 1),
            "answered": float(answered), "steps": float(counted), "lines": float(len(lines))}


TASKS = {"game24": (valid_row, score_game24)}     # what refuses an unusable row, and what scores a completion


def score(task: str, completion: str, row: dict, truncated: bool = False) -> dict[str, float] | None:
    """Total reward, its parts in [0, 1] and facts of one completion; None when the row itself is unusable.

    Every task: reward, correct (0/1: a right answer), answered (0/1: any answer). game24 also: outcome, process, length; steps (lines that
    are or should be steps), lines. Never raises on any completion. Raises ValueError on an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"unknown TASK {task!r}; there is {', '.join(TASKS)}")
    try:
        check_row(task, row)
    except ValueError:
        return None
    return TASKS[task][1](completion if isinstance(completion, str) else "", row, truncated)


def check_row(task: str, row: dict) -> None:
    """Raises ValueError, with what is wrong, on a row that cannot be scored."""
    TASKS[task][0](row)


def identity(task: str, row: dict) -> tuple:
    """What must not be in both training and test: the hand in any order, with its target; the prompt of other tasks."""
    return (*sorted(row["numbers"]), row.get("target", 24)) if task == "game24" else (row["prompt"],)


def prompt(task: str, row: dict) -> str:
    """The text that asks for a completion of the row."""
    numbers, target = valid_row(row)
    return f"Make {target} from {' '.join(map(str, numbers))}"


def game24(prompts, completions, numbers, target=None, **kwargs) -> list[float | None]:
    """TRL `reward_funcs`: one reward a completion; `numbers` and `target`, if any, are columns of the dataset. None leaves a row out."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    rows = zip(texts, numbers, target or [24] * len(texts), strict=True)
    scores = [score("game24", text, {"numbers": hand, "target": goal}) for text, hand, goal in rows]
    return [s and s["reward"] for s in scores]


def compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float:
    """verl custom reward: `data_source` is the task; `ground_truth` the row or its numbers, as an object or as JSON.

    Raises ValueError on a ground truth that cannot be scored.
    """
    truth = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
    scores = score(data_source, solution_str, truth if isinstance(truth, dict) else {"numbers": truth})
    if scores is None:
        raise ValueError(f"unusable ground_truth {ground_truth!r}: four positive integers are expected")
    return scores["reward"]
