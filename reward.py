"""The tasks: prompts, parsing and rewards, for all scripts. `python -m doctest reward.py` checks this example:

>>> completion = '''<think>
... | 10 + 4 = 14
... | 10 - 6 = 4
... 4 4 5 | 5 * 4 = 20
... 20 4 | 20 + 4 = 24
... ( 5 * 4 ) + 4
... </think>
... <answer> ( 5 * ( 10 - 6 ) ) + 4 </answer>'''
>>> row = {"numbers": [4, 5, 6, 10]}
>>> round(score("game24", completion, row)["reward"], 4)  # 0.55 * 1 + 0.30 * 4/4 + 0.15 / (1 + exp(0.2 * (5 - 24)))
0.9967
>>> round(score("game24", completion.replace("+ 4 <", "+ 5 <"), row)["reward"], 4)     # 5 used twice: only steps earn
0.3

A line of reasoning is a step, `state | a op b = c` (nothing before the | means the given numbers; no |, the last state
with a and b), or, once a step has made the target, an expression equal to it with more numbers than the one before.
Lyrics, `<think>plan</think>《title》/line/line`, earn a product of gates times a weighted sum of parts, so no part can
make up for text that is not verse.
"""

import ast
import base64
import json
import math
import re
import sys
import zlib
from collections import Counter
from contextlib import suppress
from fractions import Fraction
from functools import cache
from itertools import accumulate, chain, pairwise, permutations
from pathlib import Path

TARGET = 24                  # game24: what hands in new data and typed hands must make
# game24: the reward is the weighted sum of three parts (report on the 24-point game)
OUTCOME_WEIGHT = 0.55
PROCESS_WEIGHT = 0.30
LENGTH_WEIGHT = 0.15
WELL_FORMED = 0.35           # outcome of an answer that uses exactly the four numbers but misses the target
LENGTH_NEEDS_CORRECT = 1     # 1: only right answers earn the length reward; 0: every well-formed one does
MIN_STEPS = 3                # smallest divisor of the process reward: a solution takes three steps
MAX_EXPRESSION_CHARS = 200   # longer expressions and steps are rejected, which bounds the parsing time
MAX_EXPRESSION_DEPTH = 20    # nested brackets
MAX_LINES = 200              # lines that are read; any further line of reasoning counts as wrong
# lyrics: the weights sum to 1
FORMAT_WEIGHT = 0.25         # one think pair, title, lines
WINDOW_WEIGHT = 0.15         # number and length of lines, and length of the thought, in the range of the training texts
COVERAGE_WEIGHT = 0.30       # keywords used in lines that say something about them
RHYME_WEIGHT = 0.20
PARALLEL_WEIGHT = 0.10       # lines as long as an adjacent one
RHYME_GOAL = 0.7             # share of rhyming lines that earns full marks: ABCB has 0.5, couplets have 1
MAX_KEYWORDS_IN_LINE = 2     # a line with more is a list of keywords ...
MIN_OTHER_HAN = 3            # ... and one with fewer other characters says nothing about them
LINE_HAN = 5                 # a line with fewer characters is too common to count as copied from a training text
PRIOR = 4.0                  # pseudo-count for the bigram probabilities
UNSEEN = -3.0                # cap on the fluency of a pair in no training text, so that rare characters do not pass
FREE = "随意写一首"           # the prompt if there are no keywords


def parse_expression(text: str, target: int = 24) -> tuple[Fraction, list[int]]:
    """Value of an expression of whole numbers, + - * / and brackets, and its numbers in order; may end in `= target`.

    Also reads × ÷ − and full-width signs. Raises ValueError for leading zeros, unary minus, powers and anything else.
    """
    plain = re.sub(r"\s+", " ", text.translate(other_signs)).strip()
    plain = re.sub(f" ?= ?{target}$", "", plain)
    if len(text) > MAX_EXPRESSION_CHARS or not re.fullmatch("[-+*/() 0-9]+", plain) or re.search(r"\b0[0-9]", plain):
        raise ValueError(f"expected whole numbers, + - * / and brackets in {MAX_EXPRESSION_CHARS} characters: {text!r}")
    if max(accumulate((sign == "(") - (sign == ")") for sign in plain)) > MAX_EXPRESSION_DEPTH:
        raise ValueError(f"more than {MAX_EXPRESSION_DEPTH} nested brackets in {text!r}")

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in signs:      # not ** or //
            return operations[signs[type(node.op)]](value(node.left), value(node.right))
        raise ValueError(f"{type(node).__name__} in {text!r}")

    try:
        return value(ast.parse(plain, mode="eval").body), list(map(int, re.findall("[0-9]+", plain)))
    except (SyntaxError, ZeroDivisionError) as error:
        raise ValueError(f"{error} in {text!r}") from None


signs = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
operations = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__, "/": Fraction.__truediv__}
other_signs = str.maketrans("×÷−＋－＊／（）＝｜", "*/-+-*/()=|")
# in a step: an integer, or a fraction such as 8/3; a state has up to four of them
step_number = r"-?(?:0|[1-9][0-9]{0,8})(?:/[1-9][0-9]{0,8})?"
step_state = rf"{step_number}(?:[ ,]+{step_number}){{0,3}}"
step_line = re.compile(rf"(?:({step_state}|) ?\| ?)?({step_number}) ?([-+*/]) ?({step_number}) ?= ?({step_number})")


def hand_prompt(row: dict) -> str:
    """The prompt for a game24 row. Raises ValueError unless its four numbers and any target are positive integers."""
    numbers, target = row.get("numbers"), row.get("target", 24)
    four = isinstance(numbers, (list, tuple)) and len(numbers) == 4
    if not four or any(type(number) is not int or number < 1 for number in [*numbers, target]):
        raise ValueError(f"numbers must be a list of four positive integers, not {numbers!r} (target {target!r})")
    return f"Make {target} from {' '.join(map(str, numbers))}"


@cache
def solvable(numbers: tuple, target: int) -> bool:
    """Whether the numbers (sorted, for the cache), each used once, can make the target."""
    if len(numbers) == 1:
        return numbers[0] == target
    for a, b, *others in permutations(numbers):
        results = {a + b, a * b, a - b} | ({Fraction(a, b)} if b else set())
        if any(solvable(tuple(sorted([*others, result])), target) for result in results):
            return True
    return False


def length_reward(lines: int, threshold: int = 4, midpoint: int = 20, steepness: float = 0.2) -> float:
    """1 up to `threshold` lines of reasoning, then a falling sigmoid (report on the 24-point game, eq. 5)."""
    return 1.0 if lines <= threshold else 1 / (1 + math.exp(min(steepness * (lines - threshold - midpoint), 700)))


def split_thought(completion: str) -> tuple[str, str, str, bool]:
    """What precedes <think>, the reasoning, what follows, and whether it is closed. A template may open it."""
    before, opened, body = completion.partition("<think>")
    thought, closed, rest = (body if opened else completion).partition("</think>")
    return before if opened else "", thought, rest, bool(closed)


def judge_lines(thought: str, row: dict) -> dict[int, tuple[str, ...] | None]:
    """For each line of reasoning, by its place, the state that a right step reaches; () if it composes, None if wrong.

    A right step is correct arithmetic, not done before, on operands of a state reached before, which is the given
    numbers or the result of a right step; in a line without a |, the latest state with these operands counts. A line
    composes if it comes after a step that made the target and is an expression equal to it with more numbers than the
    one before. A state has its numbers as sorted strings.
    """
    hand, target = tuple(sorted(map(str, row["numbers"]))), row.get("target", 24)
    states, composed = {hand: set()}, 1         # the states in the order in which they were reached, with steps made
    lines = enumerate(thought.translate(other_signs).split("\n"))
    lines = {place: line.strip() for place, line in lines if line.strip()}
    reached = dict.fromkeys(lines)
    for place, line in list(lines.items())[:MAX_LINES]:
        step = step_line.fullmatch(line) if len(line) <= MAX_EXPRESSION_CHARS else None
        if step:
            given, left, sign, right, result = step.groups()
            a, b, result = Fraction(left), Fraction(right), Fraction(result)
            operands, starts = [str(a), str(b)], reversed(states)
            if given is not None:
                given = re.split("[ ,]+", given) if given else hand
                starts = states.keys() & {tuple(sorted(str(Fraction(value)) for value in given))}
            starts = (state for state in starts if all(state.count(x) >= operands.count(x) for x in operands))
            holds = (b or sign != "/") and operations[sign](a, b) == result
            start = next(starts, None) if holds else None
            made = (sign, *(sorted(operands) if sign in "+*" else operands))
            if start and made not in states[start]:
                states[start].add(made)
                rest = Counter(start) - Counter(operands)
                reached[place] = tuple(sorted([*rest.elements(), str(result)]))
                states[reached[place]] = states.pop(reached[place], set())
        elif (str(target),) in states and sum(map(line.count, operations)) < len(hand):
            with suppress(ValueError):
                value, leaves = parse_expression(line, target)
                if value == target and len(leaves) > composed:
                    composed, reached[place] = len(leaves), ()
    return reached


def score_game24(completion: str, row: dict, truncated: bool) -> dict[str, float]:
    target = row.get("target", 24)
    before, thought, rest, closed = split_thought(completion)
    reached = judge_lines(thought, row).values()
    answered = closed and "<answer>" in rest and "</answer>" in rest and not truncated
    answer = re.fullmatch(r"\s*<answer>([^<>]*)</answer>\s*", rest)
    stray = re.search("<think>|</?answer>", thought) or before.strip()
    outcome = length = 0.0
    if answered and answer and not stray:
        with suppress(ValueError):
            value, leaves = parse_expression(answer[1], target)
            if sorted(leaves) == sorted(row["numbers"]):
                outcome = 1.0 if value == target else WELL_FORMED
                length = length_reward(len(reached)) if value == target or not LENGTH_NEEDS_CORRECT else 0.0
    counted = sum(state != () for state in reached)
    process = sum(map(bool, reached)) / max(MIN_STEPS, counted)
    reward = OUTCOME_WEIGHT * outcome + PROCESS_WEIGHT * process + LENGTH_WEIGHT * length
    return {"reward": reward, "outcome": outcome, "process": process, "length": length, "correct": float(outcome == 1),
            "answered": float(answered), "steps": float(counted), "lines": float(len(reached))}


def game24_line_rewards(completion: str, row: dict) -> list[float]:
    """Reward for each line of a completion; NaN if it is not a line of reasoning.

    1: a right step after which the target can still be made, or a composing line; 0: a right step into a dead end;
    -1: a wrong or repeated line.
    """
    before, thought, _, _ = split_thought(completion)
    rewards = [math.nan] * (completion.count("\n") + 1)
    for place, state in judge_lines(thought, row).items():
        is_dead_end = state and not solvable(tuple(sorted(map(Fraction, state))), row.get("target", 24))
        rewards[before.count("\n") + place] = -1.0 if state is None else float(not is_dead_end)
    return rewards


han_range = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # Chinese characters
HAN = re.compile(f"[{han_range}]+")
table = {}      # filled by use_data: rhymes, bigrams, known lines and typical lengths of the training texts


def use_data(task: str, folder: Path) -> None:
    """Loads what a task's reward needs from its data folder: table.json for lyrics, nothing for other tasks."""
    if task == "lyrics":
        table.update(json.loads(Path(folder, "table.json").read_text(encoding="utf-8")))
        table["finals"] = {end: final for final, characters in table["finals"].items() for end in characters}
        table["lines"] = set(memoryview(base64.b64decode(table["lines"])).cast("I"))      # CRC-32 of each known line
        table["total"] = sum(table["characters"].values())


def keywords_prompt(row: dict) -> str:
    """The prompt for a lyrics row. Raises ValueError unless its keywords are a list of zero to ten Chinese words."""
    words = row.get("keywords")
    listed = isinstance(words, (list, tuple)) and len(words) <= 10
    if not listed or not all(isinstance(word, str) and HAN.search(word) for word in words):
        raise ValueError(f"keywords must be a list of at most ten Chinese words, not {words!r}")
    return "，".join(words) or FREE


def han(text: str) -> str:
    return "".join(HAN.findall(text))


def split_verse(completion: str) -> tuple[str, str, list[str], float]:
    """Thought, title, lines, and a score for the form: 1/2 for the think pair, 1/4 each for title and lines."""
    before, thought, rest, closed = split_thought(completion)
    if not closed:
        thought, rest = "", completion
    pair = closed and bool(han(thought)) and not before.strip() and "<think>" not in thought
    title = re.match(r"\s*《([^《》/\n]{1,20})》/", rest)
    verse = rest[title.end():] if title else rest
    lines = [line.strip() for line in re.split(r"[/\n]", verse)][:MAX_LINES]
    clean = len(lines) > 1 and all(map(han, lines)) and not re.search(r"[<>《》\n]", verse)
    return thought, title[1] if title else "", list(filter(None, lines)), pair / 2 + bool(title) / 4 + clean / 4


def parallel_share(lines: list[str]) -> float:
    """Share of the lines that have as many characters as the line before or after."""
    sizes = [0, *map(len, lines), 0]
    return sum(size in (before, after) for before, size, after in zip(sizes, sizes[1:], sizes[2:])) / max(1, len(lines))


def rhyme_share(lines: list[str], common: dict[str, float] | None = None) -> float:
    """Share of the lines whose last character rhymes with a different one that ends a line at most two away.

    With the shares of the rhyme classes in `common`, a line counts the less, the more common its class is.
    """
    rhymes, rhyming = [table["finals"].get(line[-1]) for line in lines], set()
    for distance in (1, 2):
        for i, j in enumerate(range(distance, len(lines))):
            if rhymes[i] and rhymes[i] == rhymes[j] and lines[i][-1] != lines[j][-1]:
                rhyming |= {i, j}
    return sum(1 - (common or {}).get(rhymes[i], 0.0) for i in rhyming) / max(1, len(lines))


def fluency(lines: list[str]) -> float:
    """Mean log of P(character | the one before it) / P(character), as estimated from the training texts."""
    characters, bigrams, gains = table["characters"], table["bigrams"], []
    for a, b in chain.from_iterable(map(pairwise, lines)):
        anywhere = (characters.get(b, 0) + 0.5) / table["total"]
        gain = math.log((bigrams.get(a + b, 0) / anywhere + PRIOR) / (characters.get(a, 0) + PRIOR))
        gains.append(gain if a + b in bigrams else min(gain, UNSEEN))
    return sum(gains) / len(gains) if gains else -math.inf


def distinct_share(lines: list[str], n: int) -> float:
    """Share of distinct ones among the n-grams of characters in lines: of pairs, low for babble (打打翻打打翻)."""
    grams = [line[i:i + n] for line in lines for i in range(len(line) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def without(words: list[str], line: str) -> str:
    return re.sub("|".join(map(re.escape, words)), "", line)


def shared_in_step(rows: list[dict], completions: list[str]) -> dict:
    """What completions for different prompts have in common, by which a lazy policy would earn its reward.

    repeated_lines: lines, stripped of their keywords, in completions for several prompts. rhyme_shares: for each rhyme
    class, the share of all lines that end in it. In a row, they make `score` count such lines as copied, and rhymes the
    less, the more common their class is.
    """
    verses = [list(filter(None, map(han, split_verse(completion)[2]))) for completion in completions]
    found = {(without(row["keywords"], line), row["prompt"]) for row, lines in zip(rows, verses) for line in lines}
    prompts = Counter(line for line, _ in found)
    ends = Counter(table["finals"].get(line[-1]) for line in chain.from_iterable(verses))
    return {"repeated_lines": {line for line, n in prompts.items() if len(line) >= MIN_OTHER_HAN and n > 1},
            "rhyme_shares": {rhyme: n / ends.total() for rhyme, n in ends.items()}}


def between(value: float, zero: float, one: float) -> float:
    """0 at `zero` and beyond, 1 at `one` and beyond, linear in between."""
    return min(1.0, max(0.0, (value - zero) / (one - zero)))


def keyword_coverage(lines: list[str], keywords: list[str]) -> float:
    """Share of the keywords that occur in lines with enough other text; 0 if a line merely lists keywords."""
    covered = set()
    for line in lines:
        present = [word for word in keywords if word in line]
        others = len(without(present, line))
        if len(present) > MAX_KEYWORDS_IN_LINE or not others:
            return 0.0
        if others >= MIN_OTHER_HAN:
            covered.update(present)
    return len(covered) / max(1, len(set(keywords)))


def score_lyrics(completion: str, row: dict, truncated: bool) -> dict[str, float]:
    if not table:
        raise ValueError("call reward.use_data('lyrics', folder) first: the reward needs the data folder's table.json")
    thought, _, lines, form = split_verse(completion)
    texts = [line for line in map(han, lines) if line]
    distinct = list(dict.fromkeys(texts))
    count, characters, planned = len(texts), len("".join(texts)), len(han(thought))

    def window(name: str, value: float) -> float:
        low, high = table[name]     # the range of most training texts
        return between(value, low / 2, low) * between(value, 2 * high, high)

    shortest, longest = table["thought_chars"]
    plan = length_reward(max(shortest - planned, planned - longest, 0), threshold=0) if thought else 0.0
    size = window("line_count", count) * window("line_chars", characters / max(1, count))
    rhyme, chance = rhyme_share(texts, row.get("rhyme_shares")), table["rhyme_chance"]
    parts = {"format": form,
             "window": (size + plan) / 2,
             "coverage": keyword_coverage(texts, row["keywords"]),
             "rhyme": between(rhyme, chance, max(RHYME_GOAL, chance + 0.1)),
             "parallel": parallel_share(texts)}
    letters = sum(map(str.isalnum, "".join(lines)))
    different_lines = between(len(distinct) / max(1, count), 0.3, 0.6)
    different_fours = between(distinct_share(distinct, 4), 0.5, 0.75)
    different_pairs = between(distinct_share(distinct, 2), 0.6 * table["pair_share"], 0.95 * table["pair_share"])
    commonest_end = max(Counter(line[-1] for line in distinct).values(), default=0)
    long_lines = [line for line in distinct if len(line) >= LINE_HAN]
    copied = [line for line in long_lines if zlib.crc32(line.encode()) in table["lines"]
              or without(row["keywords"], line) in row.get("repeated_lines", ())]
    copied = len(copied) / max(1, len(long_lines))
    gates = {"finished": float(bool(texts) and not truncated),
             "chinese": between(characters / letters, 0.6, 0.9) if letters else 0.0,
             "repetition": different_lines * different_fours * different_pairs,
             "fluency": between(fluency(distinct), *table["fluency"]),
             "ending": between(commonest_end / len(distinct), 0.8, 0.5) if len(distinct) > 1 else float(bool(distinct)),
             "original": between(copied, 0.6, 0.3)}
    weights = (FORMAT_WEIGHT, WINDOW_WEIGHT, COVERAGE_WEIGHT, RHYME_WEIGHT, PARALLEL_WEIGHT)
    reward = math.prod(gates.values()) * sum(weight * part for weight, part in zip(weights, parts.values()))
    answered = form == 1 and not truncated
    correct = answered and parts["coverage"] == 1 and min(gates.values()) >= 0.5
    return {"reward": reward, **parts, **gates, "correct": float(correct), "answered": float(answered),
            "lines": float(count), "rhyming": rhyme_share(texts), "copied": copied}


# for each task: what rejects an unusable row (here the function that makes its prompt), and what scores a completion
TASKS = {"game24": (hand_prompt, score_game24), "lyrics": (keywords_prompt, score_lyrics)}
# for tasks that have it: what rewards each line of a completion (CREDIT=steps in grpo.py)
LINE_REWARDS = {"game24": game24_line_rewards}


def prompt(task: str, row: dict) -> str:
    """The prompt for a row. Raises ValueError with the reason if the row cannot be scored."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, not {type(row).__name__}")
    return TASKS[task][0](row)


def score(task: str, completion: str, row: dict, truncated: bool = False) -> dict[str, float] | None:
    """Reward of a completion, its parts in [0, 1], and facts: `correct` and `answered` (0/1), counts, shares of lines.

    None if the row is unusable. No completion makes it raise; an unknown task, or lyrics before use_data, does.
    """
    try:
        prompt(task, row)
    except ValueError:
        return None
    return TASKS[task][1](completion if isinstance(completion, str) else "", row, truncated)


def identity(task: str, row: dict) -> tuple:
    """What train and test must not share: numbers or keywords in any order, the text if no keywords, or the prompt."""
    if task == "game24":
        return (*sorted(row["numbers"]), row.get("target", 24))
    if task == "lyrics":
        return tuple(sorted(row["keywords"])) or (row.get("completion"),)
    return (row["prompt"],)


def question(task: str, text: str) -> dict:
    """The row for typed numbers or keywords, separated by spaces or punctuation. Raises ValueError if unusable."""
    words = re.findall(r"[^\s,，、。！；;/]+", text)
    if task not in ("game24", "lyrics"):
        raise ValueError(f"questions can be typed for game24 and lyrics, not for {task}")
    row = {"keywords": words}
    if task == "game24":
        row = {"numbers": [int(word) if word.isdecimal() else word for word in words]}
        row |= {} if TARGET == 24 else {"target": TARGET}
    return {"prompt": prompt(task, row), **row}


def plain_row(row: dict) -> dict:
    """A Dataset or pandas row in plain types: arrays become lists, 24.0 becomes 24, None and NaN are left out."""
    row = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}
    row = {name: int(value) if type(value) is float and value.is_integer() else value for name, value in row.items()}
    return {name: value for name, value in row.items() if value is not None and value == value}


def trl_rewards(task: str, completions: list, **columns) -> list[float | None]:
    texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
    rows = [plain_row(dict(zip(columns, values))) for values in zip(*columns.values(), strict=True)]
    return [(score(task, text, row) or {}).get("reward") for text, row in zip(texts, rows, strict=True)]


def game24(prompts, completions, numbers, target=None, **kwargs) -> list[float | None]:
    """TRL `reward_funcs`: one reward per completion, None for an unusable row; `numbers` and `target` are columns."""
    target = [None] * len(numbers) if target is None else target
    return trl_rewards("game24", completions, numbers=numbers, target=target)


def lyrics(prompts, completions, keywords, **kwargs) -> list[float | None]:
    """TRL `reward_funcs`, like game24, but call use_data first; `keywords` is a column."""
    return trl_rewards("lyrics", completions, keywords=keywords)


def compute_score(data_source, solution_str, ground_truth, extra_info=None) -> dict[str, float]:
    """Custom reward for verl: "score" is the reward, "acc" is `correct` or, for lyrics, the reward; then the parts.

    `data_source` is the task; `ground_truth` is a row, its numbers or keywords, or JSON of it. ValueError if unusable.
    """
    truth = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
    name = "keywords" if data_source == "lyrics" else "numbers"
    row = plain_row(truth if isinstance(truth, dict) else {name: truth})
    prompt(data_source, row)        # raises ValueError if the row is unusable
    parts = score(data_source, solution_str, row)
    total = parts.pop("reward")
    return {"score": total, "acc": total if data_source == "lyrics" else parts["correct"], **parts}


def read_rows(task: str, path: Path, *needs: str) -> list[dict]:
    """Rows of a jsonl file, which must have the named text fields. Exits with file, line and reason at a bad one."""
    if not path.is_file():
        sys.exit(f"{path} is missing: run `make data`, or set DATA= to a folder that has it")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt(task, row)
            for name in needs:
                if not isinstance(row.get(name), str) or not row[name]:
                    raise ValueError(f"{name!r} must be a non-empty string, not {row.get(name)!r}")
        except ValueError as error:
            sys.exit(f"{path}:{number}: {error}")
        rows.append(row)
    return rows or sys.exit(f"{path} is empty: run `make data`")


def read_hands(path: Path) -> list[tuple[int, ...]]:
    """Hands of a file, each sorted: a line is four numbers or, in a csv, has a cell like 4 5 6 10.

    Exits, naming the first line with anything else; the first one may have names of columns.
    """
    hands, four_numbers = [], re.compile(r"\s*[1-9][0-9]*(\s+[1-9][0-9]*){3}\s*")
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").split("\n"), 1):
        cells = line.replace('"', "").split(",")
        hand = next(filter(four_numbers.fullmatch, [*cells, " ".join(cells)]), None)
        if hand:
            hands.append(tuple(sorted(map(int, hand.split()))))
        elif line.strip() and (number > 1 or not re.search(r"[^\W\d]{3}|^(?:a,b|n_?1),", line, re.I)):
            sys.exit(f"{path}:{number}: four positive integers are expected, not {line!r}")
    return list(dict.fromkeys(hands)) or sys.exit(f"{path}: no hand in it")


def refuse_overlap(task: str, train: list[dict], held_out: list[dict], path: Path) -> None:
    """Exits if any held-out row, from the file at `path`, is also in the training data."""
    trained_on = {identity(task, row) for row in train}
    shared = [row["prompt"] for row in held_out if identity(task, row) in trained_on]
    if shared:
        sys.exit(f"{len(shared)} of {len(held_out)} rows of {path} are also in train.jsonl, such as {shared[0]!r}: "
                 "results on them would be meaningless. Make data that holds them out (hands: `make train HOLDOUT=`)")
