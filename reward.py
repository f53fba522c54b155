"""The task contract: prompt, parser and rewards. Every other script imports this file; it imports only the standard library.

A whole example of the 24-point game (`python -m doctest reward.py` checks it):

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

A verse of TASK=lyrics is `<think>plan</think>《title》/line/line`. Its reward is gates x weighted parts, so that no part can be traded
against being a text at all. Known holes, which a judge sees: keywords glued onto lines that have nothing to do with them count as covered;
lines of common pairs of characters are fluent without sense; a copied line with one other character is no copy; of a thought the length counts.
"""

import base64
import json
import math
import re
import zlib
from array import array
from collections import Counter
from fractions import Fraction
from pathlib import Path

# game24
OUTCOME_WEIGHT = 0.55        # the total is the weighted sum of these three (report on the 24-point game)
PROCESS_WEIGHT = 0.30
LENGTH_WEIGHT = 0.15
WELL_FORMED = 0.35           # outcome of an expression over exactly the four numbers with another value
LENGTH_NEEDS_CORRECT = 1     # 1: the length reward is paid for right answers only; 0: for every well-formed one
MIN_STEPS = 3                # least divisor of the process reward: a solution has three steps
MAX_EXPRESSION_CHARS = 200   # a longer expression or line is refused, which bounds the time of any input
MAX_EXPRESSION_DEPTH = 20    # nested brackets
MAX_LINES = 200              # lines that are read; of a reasoning each further one counts as wrong
# lyrics: the weights of the parts sum to 1
FORMAT_WEIGHT = 0.25         # one think pair, title, lines
WINDOW_WEIGHT = 0.15         # lines, characters and thought about as long as those of the training texts
COVERAGE_WEIGHT = 0.30       # keywords that stand in a line of their own right
RHYME_WEIGHT = 0.20
PARALLEL_WEIGHT = 0.10       # lines as long as a neighbour
RHYME_GOAL = 0.7             # share of rhyming lines that earns all; ABCB has a half, couplets have all
MAX_KEYWORDS_IN_LINE = 2     # a line with more is a list of keywords ...
MIN_OTHER_HAN = 3            # ... and one with fewer other characters says nothing of them
LINE_HAN = 5                 # characters from which a line that is in a training text counts as copied; shorter ones are anyone's
PRIOR = 4.0                  # pseudo-count of the bigram probabilities
UNSEEN = -3.0                # fluency of a pair that no training text has, at most: characters that are rare there must not pass as fluent
FREE = "随意写一首"           # the prompt of a text without keywords

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


han_range = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"      # Chinese characters, with 々 and 〇
HAN = re.compile(f"[{han_range}]+")
table = {}                   # of the training texts: rhymes, bigrams, known lines, usual lengths; use_data fills it


def use_data(task: str, folder: Path) -> None:
    """Loads what a task's reward takes from its data folder: table.json of data_prep.py, for lyrics. Raises ValueError where it is not there."""
    if task != "lyrics":
        return
    try:
        made = json.loads(Path(folder, "table.json").read_text(encoding="utf-8"))
        made["finals"] = {character: final for final, characters in made["finals"].items() for character in characters}
        made["lines"] = set(array("I", base64.b64decode(made["lines"])))
        made["total"] = sum(made["characters"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}/table.json, which the rewards of lyrics need, cannot be read: {str(error)[:200]}. "
                         "`make data TASK=lyrics` makes it, once the summary.json beside it, if there is one, is removed")
    table.clear()
    table.update(made)


def valid_keywords(row: dict) -> list[str]:
    """The keywords of a row; none for a text that is written freely. Raises ValueError with what is there instead."""
    keywords = row.get("keywords") if isinstance(row, dict) else None
    if not isinstance(keywords, (list, tuple)) or len(keywords) > 10 or not all(isinstance(k, str) and HAN.search(k) for k in keywords):
        raise ValueError(f"keywords must be a list of at most ten Chinese words, not {keywords!r}")
    return list(keywords)


def han(text: str) -> str:
    """The Chinese characters of a text, without all else."""
    return "".join(HAN.findall(text))


def split_verse(completion: str) -> tuple[str, str, list[str], float]:
    """Thought, title and lines of a completion, and how much of the form it keeps: a half for the think pair, a quarter each for title and lines."""
    before, opened, body = completion.partition("<think>")
    thought, closed, rest = (body if opened else completion).partition("</think>")     # a chat template may have opened it
    if not closed:
        thought, rest = "", completion
    title = re.match(r"\s*《([^《》/\n]{1,20})》/", rest)
    rest = rest[title.end():] if title else rest
    lines = [line.strip() for line in re.split(r"[/\n]", rest)][:MAX_LINES]
    pair = bool(closed and han(thought)) and not before.strip() and "<think>" not in thought
    kept = 2 * pair + bool(title) + (len(lines) > 1 and all(map(han, lines)) and not re.search(r"[<>《》\n]", rest))
    return thought, title[1] if title else "", [line for line in lines if line], kept / 4


def between(value: float, zero: float, one: float) -> float:
    """0 at `zero` and beyond, 1 at `one` and beyond, in a line between them."""
    return min(1.0, max(0.0, (value - zero) / (one - zero)))


def parallel_share(lines: list[str]) -> float:
    """Share of the lines, of Chinese characters alone, that have as many as the line before or after."""
    sizes = [0, *map(len, lines), 0]
    return sum(sizes[i] in (sizes[i - 1], sizes[i + 1]) for i in range(1, len(sizes) - 1)) / max(1, len(lines))


def rhyme_share(lines: list[str]) -> float:
    """Share of the lines whose last character rhymes with that of a line at most two away, and is another character."""
    ends = [line[-1] for line in lines]
    finals = [table["finals"].get(end) for end in ends]
    return sum(any(i != j and finals[i] and finals[i] == finals[j] and ends[i] != ends[j] for j in range(max(0, i - 2), min(len(ends), i + 3)))
               for i in range(len(ends))) / max(1, len(ends))


def fluency(lines: list[str]) -> float:
    """Mean log of how much likelier a character is after the one before it than anywhere, by the bigrams of the training texts."""
    characters, bigrams, total, gains = table["characters"], table["bigrams"], table["total"], []
    for line in lines:
        for a, b in zip(line, line[1:]):
            alone = (characters.get(b, 0) + 0.5) / total
            gain = math.log((bigrams.get(a + b, 0) / alone + PRIOR) / (characters.get(a, 0) + PRIOR))
            gains.append(gain if a + b in bigrams else min(gain, UNSEEN))
    return sum(gains) / len(gains) if gains else -math.inf


def pair_share(lines: list[str]) -> float:
    """Share of different pairs of neighbouring characters among those of all different lines; babble such as 打打翻打打翻 has few."""
    pairs = [line[i:i + 2] for line in dict.fromkeys(lines) for i in range(len(line) - 1)]
    return len(set(pairs)) / max(1, len(pairs))


def line_code(line: str) -> int:
    """Hash of the characters of a line, as the known lines are stored."""
    return zlib.crc32(han(line).encode())


def known(line: str) -> bool:
    """Whether the line is one of a training text."""
    return line_code(line) in table["lines"]


def score_lyrics(completion: str, row: dict, truncated: bool) -> dict[str, float]:
    if not table:
        raise ValueError("the rewards of lyrics need a table of the training texts: call reward.use_data('lyrics', folder of the data) first")
    keywords = valid_keywords(row)
    thought, _, lines, form = split_verse(completion)
    texts = [line for line in map(han, lines) if line]
    distinct, joined = list(dict.fromkeys(texts)), "".join(texts)
    count, size = len(texts), len(joined)
    found, listed = set(), False
    for line in texts:
        there = [k for k in keywords if k in line]
        others = len(re.sub("|".join(map(re.escape, there)), "", line))      # also without what repeats a keyword
        listed |= len(there) > MAX_KEYWORDS_IN_LINE or not others
        found.update(there if others >= MIN_OTHER_HAN else [])
    coverage = len(found) / len(set(keywords)) if keywords and not listed else 0.0

    def window(name, value):        # 1 where most training texts lie, 0 from half the least and twice the most of them
        low, high = table[name]
        return between(value, low / 2, low) * between(value, 2 * high, high)

    planned = len(han(thought))
    shortfall = max(table["thought_chars"][0] - planned, planned - table["thought_chars"][1], 0)
    size_window = window("line_count", count) * window("line_chars", size / max(1, count))
    rhyming, chance = rhyme_share(texts), table["rhyme_chance"]
    fours = [line[i:i + 4] for line in distinct for i in range(len(line) - 3)]
    letters = sum(map(str.isalnum, "".join(lines)))
    ends = Counter(line[-1] for line in distinct)
    long = [line for line in distinct if len(line) >= LINE_HAN]
    copied = sum(map(known, long)) / max(1, len(long))
    parts = {"format": form, "window": (size_window + length_reward(shortfall, threshold=0) * bool(thought)) / 2, "coverage": coverage,
             "rhyme": between(rhyming, chance, max(RHYME_GOAL, chance + 0.1)), "parallel": parallel_share(texts)}
    gates = {"finished": float(not truncated and bool(texts)), "chinese": between(size / letters, 0.6, 0.9) if letters else 0.0,
             "repetition": between(len(distinct) / count, 0.3, 0.6) * between(len(set(fours)) / len(fours), 0.5, 0.75)
             * between(pair_share(distinct), 0.6 * table["pair_share"], 0.95 * table["pair_share"]) if fours else 0.0,
             "fluency": between(fluency(distinct), *table["fluency"]) if size > count else 0.0,
             "ending": between(max(ends.values()) / len(distinct), 0.8, 0.5) if len(distinct) > 1 else float(bool(distinct)),
             "original": between(copied, 0.6, 0.3)}
    weights = {"format": FORMAT_WEIGHT, "window": WINDOW_WEIGHT, "coverage": COVERAGE_WEIGHT, "rhyme": RHYME_WEIGHT, "parallel": PARALLEL_WEIGHT}
    reward = math.prod(gates.values()) * sum(weights[name] * value for name, value in parts.items())
    answered = form == 1 and not truncated
    return {"reward": reward, **parts, **gates, "correct": float(answered and coverage == 1 and min(gates.values()) >= 0.5),
            "answered": float(answered), "lines": float(count), "rhyming": rhyming, "copied": copied}


TASKS = {"game24": (valid_row, score_game24), "lyrics": (valid_keywords, score_lyrics)}      # what refuses an unusable row; what scores


def score(task: str, completion: str, row: dict, truncated: bool = False) -> dict[str, float] | None:
    """Total reward, its parts in [0, 1] and facts of one completion; None when the row itself is unusable.

    Every task: reward, correct (0/1: a right answer), answered (0/1: any answer). game24 also: outcome, process, length; steps (lines that
    are or should be steps), lines. lyrics also: the parts format, window, coverage, rhyme, parallel; the gates finished, chinese, repetition,
    fluency, ending, original; lines, rhyming and copied (shares of lines); correct is every keyword covered, in full form, and every gate half
    open. Never raises on any completion. Raises ValueError on an unknown task, and for lyrics before use_data.
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
    """What must not be in both training and test: the hand or the keywords in any order, a free text itself; the prompt of other tasks."""
    if task == "game24":
        return (*sorted(row["numbers"]), row.get("target", 24))
    if task == "lyrics":
        return tuple(sorted(row["keywords"])) or (row.get("completion"),)
    return (row["prompt"],)


def prompt(task: str, row: dict) -> str:
    """The text that asks for a completion of the row. Raises ValueError on a row that cannot be scored."""
    if task == "lyrics":
        return "，".join(valid_keywords(row)) or FREE
    numbers, target = valid_row(row)
    return f"Make {target} from {' '.join(map(str, numbers))}"


def question(task: str, text: str) -> dict:
    """The row of a question that a person types: four numbers, or keywords, with spaces or commas between them. Raises ValueError."""
    words = [word for word in re.split(r"[\s,，、。！；;/]+" if task == "lyrics" else r"[\s,，、]+", text) if word]
    if not words:
        raise ValueError(f"numbers or keywords must be given, not {text!r}")
    row = {"keywords": words} if task == "lyrics" else {"numbers": [int(word) if word.isascii() and word.isdigit() else word for word in words]}
    return {**row, "prompt": prompt(task, row)}


def game24(prompts, completions, numbers, target=None, **kwargs) -> list[float | None]:
    """TRL `reward_funcs`: one reward a completion; `numbers` and `target`, if any, are columns of the dataset. None leaves a row out."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    rows = zip(texts, numbers, target or [24] * len(texts), strict=True)
    scores = [score("game24", text, {"numbers": hand, "target": goal}) for text, hand, goal in rows]
    return [s and s["reward"] for s in scores]


def lyrics(prompts, completions, keywords, **kwargs) -> list[float | None]:
    """TRL `reward_funcs` like game24, after use_data; `keywords` is a column of the dataset."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    scores = [score("lyrics", text, {"keywords": words}) for text, words in zip(texts, keywords, strict=True)]
    return [s and s["reward"] for s in scores]


def compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float:
    """verl custom reward: `data_source` is the task; `ground_truth` the row, its numbers or its keywords, as an object or as JSON.

    Raises ValueError on a ground truth that cannot be scored.
    """
    truth = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
    scores = score(data_source, solution_str, truth if isinstance(truth, dict) else {"keywords" if data_source == "lyrics" else "numbers": truth})
    if scores is None:
        raise ValueError(f"unusable ground_truth {ground_truth!r}: four positive integers, or for lyrics keywords, are expected")
    return scores["reward"]
