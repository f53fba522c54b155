"""Makes the data of a task: runs/TASK/data/{train,val,test}.jsonl.

    python data_prep.py                        # half a minute on one core
    python data_prep.py --holdout=hands.txt    # these hands become the test split and are kept out of train and val

game24: enumerates all hands of four numbers, solves them exactly, splits the solvable ones by hand and writes search traces
for SFT: try first steps in their order, go back from what cannot make 24, and at the end compose the answer from the steps.
Unlike a depth-first search, a trace goes on with three numbers only if that solves the hand, or for one step: so each line back
at the four numbers says of three others that they are hopeless, and a model that errs is never stuck among them.
"""

import argparse
import csv
import difflib
import fcntl
import hashlib
import json
import os
import platform
import random
import re
import shutil
import sys
from fractions import Fraction
from functools import cache
from importlib.metadata import version
from itertools import combinations_with_replacement
from pathlib import Path

from tqdm import tqdm

import reward

# Run
TASK = "game24"
OUT = ""                     # root folder of the run; empty: runs/TASK
RESUME = 1                   # 0: make the data anew where finished data of other constants is
SEED = 0                     # of the split and of the traces
HOLDOUT = ""                 # file of hands, one a line (`4 5 6 10`, or the last four columns of a csv): the test split
# Game
TARGET = 24
LOWEST, HIGHEST = 1, 13      # numbers of a hand: a deck of cards
VAL_HANDS = 136              # a tenth of the 1,362 solvable hands
TEST_HANDS = 272             # a fifth
# Traces
TRACES_PER_HAND = 128        # for SFT; equal traces are written once
MAX_TRACE_TOKENS = 250       # words of a completion, a longer one is drawn again; a twentieth is above the tiny model's limit in grpo.py
LARGEST = 200                # results above it are tried only where a solution needs them
TRY_RIGHT = 0.4              # chance that the search, in its order, tries a step after which the target can be made ...
TRY_WRONG = 0.45             # ... and one after which it cannot
SLIP = 0.05                  # chance that a right first step is followed by a wrong second one
ENTER = 0.2                  # chance that a second step is tried where none can lead to the target, before going back

Step = tuple[Fraction, str, Fraction, Fraction]      # a, operator, b, result


# ---- the 24-point game ----------------------------------------------------------------------------------------------


@cache
def steps_from(state: tuple[Fraction, ...]) -> tuple[tuple[Step, tuple[Fraction, ...]], ...]:
    """All steps from a state, the larger operand first, each with the state it makes: the result, then the rest in order.

    Results below zero are not needed: whatever they solve, a swapped subtraction solves too.
    """
    found = {}
    for i in range(len(state)):
        for j in range(i + 1, len(state)):
            a, b = max(state[i], state[j]), min(state[i], state[j])
            rest = tuple(v for k, v in enumerate(state) if k not in (i, j))
            steps = [(a, "+", b, a + b), (a, "-", b, a - b), (a, "*", b, a * b)]
            steps += [(a, "/", b, exact(a, b))] if b else []
            steps += [(b, "/", a, exact(b, a))] if a != b else []
            found.update({step: (step[3], *rest) for step in steps})
    return tuple(found.items())


def exact(a: Fraction | int, b: Fraction | int) -> Fraction | int:
    """a / b, as an int where it is whole: ints are several times faster to compare and to hash."""
    quotient = Fraction(a) / b
    return int(quotient) if quotient.denominator == 1 else quotient


@cache
def solvable(state: tuple[Fraction, ...], target: int) -> bool:
    """Whether the numbers of a sorted state, each used once, make the target."""
    if len(state) == 1:
        return state[0] == target
    return any(solvable(tuple(sorted(after)), target) for _, after in steps_from(state))


def write_trace(hand: list[int], target: int, rng: random.Random) -> str:
    """One completion for a solvable hand: a search with backtracking that ends in the composed answer."""
    lines = []

    def line(state, step):
        lines.append(f"{' '.join(map(str, state))} | {step[0]} {step[1]} {step[2]} = {step[3]}")

    def choices(state):
        """Steps from a state with what they make and whether that is solvable; odd ones only where nothing else leads on."""
        every = [(step, after, solvable(tuple(sorted(after)), target)) for step, after in steps_from(state)]
        found = [choice for choice in every if plausible(choice[0])]
        return found if any(right for *_, right in found) else [choice for choice in every if plausible(choice[0]) or choice[2]]

    untried, seen, steps = choices(tuple(hand)), set(), []
    while not steps:                # in order, some of the first steps; what was passed over comes when all else has failed
        for choice in list(untried):
            first, state, right = choice
            if steps or rng.random() > (TRY_RIGHT if right else TRY_WRONG):
                continue
            untried.remove(choice)
            line(hand, first)
            if right and (rng.random() > SLIP or not any(solves for *_, solves in untried)):
                second, pair, _ = next(c for c in choices(state) if c[2])
                steps = [first, second, next(c[0] for c in choices(pair) if c[2])]
                line(state, second)
                line(pair, steps[-1])
                continue
            misses = [second for second, _, solves in choices(state) if not solves and (tuple(sorted(state)), second) not in seen]
            if misses and rng.random() < ENTER:
                second = rng.choice(misses)
                seen.add((tuple(sorted(state)), second))
                line(state, second)

    expression = f"{steps[-1][0]} {steps[-1][1]} {steps[-1][2]}".split()
    composed = []
    for a, operator, b, result in reversed(steps[:-1]):
        place = expression.index(str(result))
        expression[place:place + 1] = f"( {a} {operator} {b} )".split()
        composed.append(" ".join(expression))
    lines += composed[:-1]
    return "<think>\n" + "\n".join(lines) + f"\n</think>\n<answer> {composed[-1]} </answer>"


def count_words(completion: str) -> int:
    """Words and newlines: the tokens of MODEL=tiny."""
    return len(completion.replace("\n", " \n ").split(" "))


def plausible(step: Step) -> bool:
    """Whether a search would try it without a reason: no fractions, no large numbers."""
    return step[3].denominator == 1 and step[3] <= LARGEST


def read_hands(path: Path) -> list[tuple[int, ...]]:
    """Hands of a file, sorted: one a line, `4 5 6 10` or the last four columns of a csv. Exits with file, line and reason."""
    hands = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        sys.exit(f"{path}: {error}")
    for number, cells in enumerate(csv.reader(lines), 1):
        words = " ".join(cells).split()
        if not words or (number == 1 and not words[-1].isdigit()):      # blank, or the heading of a csv
            continue
        if len(words) < 4 or not all(re.fullmatch("[1-9][0-9]*", word) for word in words[-4:]) or (len(cells) == 1 and len(words) > 4):
            sys.exit(f"{path}:{number}: four positive integers are expected, not {' '.join(words)!r}")
        hands.append(tuple(sorted(map(int, words[-4:]))))
    if not hands:
        sys.exit(f"{path}: no hand in it")
    return hands


def write_rows(path: Path, rows: list[dict]) -> None:
    """Writes a jsonl file: aside first, then renamed into place, so that it is never half written."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    flush(aside)
    os.replace(aside, path)


def prepare_game24(folder: Path) -> dict:
    """Writes train, val and test of the 24-point game; returns what summary.json says of them."""
    hands = list(combinations_with_replacement(range(LOWEST, HIGHEST + 1), 4))
    can = [hand for hand in hands if solvable(hand, TARGET)]
    print(f"{len(hands)} hands of {LOWEST}..{HIGHEST}, {len(can)} can make {TARGET}")
    rng = random.Random(SEED)
    rng.shuffle(can)
    if HOLDOUT:
        test = [hand for hand in dict.fromkeys(read_hands(Path(HOLDOUT))) if solvable(hand, TARGET)]
        can = [hand for hand in can if hand not in set(test)]
        print(f"{HOLDOUT}: {len(test)} hands that can make {TARGET} are the test split")
    else:
        test, can = can[:TEST_HANDS], can[TEST_HANDS:]
    splits = {"train": can[VAL_HANDS:], "val": can[:VAL_HANDS], "test": test}
    if not all(splits.values()):
        sys.exit(f"not enough hands: {', '.join(f'{name} has {len(part)}' for name, part in splits.items())}; lower VAL_HANDS or TEST_HANDS")
    summary = {"hands": len(hands), "solvable": len(can) + len(test)}
    for name, part in splits.items():
        rows, lengths = [], []
        for hand in tqdm(part, desc=name, unit="hand", dynamic_ncols=True):
            made = {}
            for _ in range(TRACES_PER_HAND if name == "train" else 1):
                numbers = list(hand)
                rng.shuffle(numbers)
                row = {"numbers": numbers} | ({"target": TARGET} if TARGET != 24 else {})
                for _ in range(1000):
                    completion = write_trace(numbers, TARGET, rng)
                    if count_words(completion) <= MAX_TRACE_TOKENS:
                        break
                else:
                    sys.exit(f"no trace of {numbers} is within MAX_TRACE_TOKENS={MAX_TRACE_TOKENS}, the last has {count_words(completion)} words")
                made[completion] = {"id": "", "prompt": reward.prompt(TASK, row), "completion": completion, **row}
            rows += made.values()
        rng.shuffle(rows)
        for index, row in enumerate(rows):
            row["id"] = f"{name}-{index}"
            lengths.append(count_words(row["completion"]))
        write_rows(folder / f"{name}.jsonl", rows)
        lengths.sort()
        percentiles = {f"p{p}": lengths[(len(lengths) - 1) * p // 100] for p in (5, 50, 95, 100)}
        print(f"{name}: {len(part)} hands, {len(rows)} rows, words of a completion {percentiles}")
        summary[name] = {"hands": len(part), "rows": len(rows), **percentiles}
    print(f"\n{rows[0]['prompt']}\n{rows[0]['completion']}\n")
    return summary


def main() -> None:
    constants = override_constants(sys.argv[1:])
    recipes = {"game24": prepare_game24}
    if TASK not in recipes:
        sys.exit(f"no recipe makes the data of TASK={TASK}; there is {', '.join(recipes)}. Set DATA= to a folder that has it")
    if HOLDOUT and not Path(HOLDOUT).is_file():
        sys.exit(f"HOLDOUT={HOLDOUT}: there is no such file")
    if not 1 <= LOWEST <= HIGHEST:
        sys.exit(f"numbers must be from 1 up: LOWEST={LOWEST}, HIGHEST={HIGHEST}")
    folder = Path(OUT or f"runs/{TASK}") / "data"
    start_run(folder, constants, {"HOLDOUT": sha256(Path(HOLDOUT))} if HOLDOUT else {}, "cpu")       # what was cut off is made again
    finish_run(folder, recipes[TASK](folder))


# ---- plumbing: constants, folder and data of a run ------------------------------------------------------------------


def override_constants(argv: list[str], is_tiny=lambda given: False) -> dict:
    """Sets the CAPS constants of this file and of reward.py from `--name=value`; returns all of them.

    Exits with the nearest names where there is no such constant, and with the type where a value does not fit.
    """
    scopes = {name: scope for scope in (vars(reward), globals()) for name, value in list(scope.items())
              if re.fullmatch("[A-Z][A-Z0-9_]*", name) and isinstance(value, (int, float, str))}
    source = "\n".join(Path(module.__file__).read_text(encoding="utf-8") for module in (reward, sys.modules[__name__]))
    comments = dict(re.findall(r"^([A-Z][A-Z0-9_]*) = [^#\n]*(?:# (.*))?$", source, re.MULTILINE))
    tiny = globals().get("TINY", {})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name, scope in scopes.items():
        default = f"{scope[name]!r}" + (f", tiny: {tiny[name]!r}" if name in tiny else "")
        parser.add_argument(f"--{name.lower()}", type=type(scope[name]), metavar=type(scope[name]).__name__,
                            help=f"({default}) {comments.get(name, '')}".replace("%", "%%"), default=argparse.SUPPRESS)
    known, unknown = parser.parse_known_args(argv)
    for word in unknown:
        name = word.split("=")[0].lstrip("-").upper()
        near = [f"--{n.lower()}" for n in difflib.get_close_matches(name, scopes, 3, 0.5)]
        parser.exit(2, f"{Path(__file__).name}: no constant {name}" + (f"; did you mean {' or '.join(near)}?\n" if near else "; see --help\n"))
    given = {name.upper(): value for name, value in vars(known).items()}
    for name, value in {**(tiny if is_tiny(given) else {}), **given}.items():
        scopes[name][name] = value
    if TASK not in reward.TASKS:
        parser.exit(2, f"{Path(__file__).name}: unknown TASK {TASK!r}; there is {', '.join(reward.TASKS)}\n")
    return {name: scope[name] for name, scope in scopes.items()}


def start_run(folder: Path, constants: dict, inputs: dict[str, str], device: str) -> bool:
    """Takes the run folder for this process alone; returns whether it holds a run that was cut off and can go on.

    A new run stores source, constants, versions, device and hashes of the inputs, and prints the constants. Exits with 0 where the
    folder holds the finished run of the same constants and inputs; with the difference and the two ways out where it holds another
    one; and where another process works in it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder.parent / f".{folder.name}.lock", os.O_RDWR | os.O_CREAT)      # never closed: it is held until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"{folder}: another process works in it. Wait for its end, or set OUT= to another folder")
    # they say where and how fast, not what
    free = ("OUT", "DATA", "SFT", "RESUME", "STRICT", "THREADS", "MICRO_BATCH_TOKENS", "EVAL_BATCH_TOKENS", "HEAD_CHUNK", "GRADIENT_CHECKPOINTING",
            "SAVE_EVERY", "KEEP_LAST")
    sources = [Path(__file__).resolve(), Path(reward.__file__).resolve()]
    header = {"constants": constants, "inputs": inputs | {path.name: sha256(path) for path in sources}, "device": device,
              "python": platform.python_version(), "versions": {p: version(p) for p in ("torch", "transformers", "peft", "bitsandbytes", "numpy")}}
    run, finished = folder / "run.json", (folder / "summary.json").is_file()
    if folder.is_dir() and any(path.suffix not in (".png", ".tmp") for path in folder.iterdir()) and not run.is_file():
        sys.exit(f"{folder} holds files that are not of a run: choose another OUT=")
    if RESUME and (finished or any(folder.glob("*.jsonl")) or any(folder.glob("step-*"))):
        try:
            old = json.loads(run.read_text(encoding="utf-8"))
            then, now = ({**h["constants"], **h["inputs"]} for h in (old, header))
        except (ValueError, TypeError, KeyError) as error:
            sys.exit(f"{run} is damaged: {error!r}.\nOUT= another folder keeps the run, RESUME=0 replaces it")
        changed = [f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in {**then, **now}
                   if then.get(name) != now.get(name) and name not in free]
        if changed:
            sys.exit(f"{folder} is {'a finished' if finished else 'an unfinished'} run of something else: {'; '.join(changed)}.\n"
                     "OUT= another folder keeps it, RESUME=0 replaces it")
        if finished:
            (folder / "summary.json").touch()
            print(f"{folder} is complete: nothing to do")
            sys.exit(0)
        return True
    replaced = folder.parent / f".{folder.name}.replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.is_dir():
        os.rename(folder, replaced)         # at once: half a folder would be nobody's
    folder.mkdir()
    write_json(run, header)
    for source in sources:
        shutil.copy(source, folder)
    shutil.rmtree(replaced, ignore_errors=True)
    print("\n".join(f"{name} = {value!r}" for name, value in constants.items()))
    return False


def finish_run(folder: Path, summary: dict) -> None:
    """Writes summary.json, whose presence says that the run is complete, and prints it as `name: value` lines."""
    write_json(folder / "summary.json", summary)
    print("\n".join(f"{name}: {value}" for name, value in summary.items()))


def write_json(path: Path, value) -> None:
    """Writes a file aside, flushes it to the disk, and renames it into place: it is never half written."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    flush(aside)
    os.replace(aside, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    main()
