"""How accuracy depends on what the training traces show: `.venv/bin/python tests/seen.py`, after `make train`.

Groups the test hands by how often the traces show three numbers that such a hand leads to and that still solve it.
"""

import itertools
import re
from collections import Counter, defaultdict
from fractions import Fraction

import conftest  # noqa: F401  the scripts can be imported
from commands import ROOT, read

import reward

RUN = ROOT / "runs/game24"
RARE = 256          # times in the traces of all training hands


def after(numbers, a: str, b: str, result) -> tuple:
    """The sorted numbers after a step on a and b, as texts."""
    return tuple(sorted((Counter(map(str, numbers)) - Counter([a, b])).elements()) + [str(result)])


def best_seen(hand: list[int], seen: Counter) -> int:
    """How often the traces show the best known of the three numbers by which a hand can be solved."""
    counts = [0]
    for a, b in itertools.permutations(hand, 2):
        for operation in reward.operations.values():
            state = after(hand, str(a), str(b), operation(Fraction(a), Fraction(b)))
            if reward.solvable(tuple(sorted(map(Fraction, state))), 24):
                counts.append(seen[tuple(sorted(state))])
    return max(counts)


seen = Counter()
for row in read(RUN / "data/train.jsonl"):
    for a, b, result in re.findall(r"^\| (\S+) \S (\S+) = (\S+)$", row["completion"], re.M):
        seen[tuple(sorted(after(row["numbers"], a, b, result)))] += 1
for policy in ("sft", "grpo"):
    groups = defaultdict(list)
    for row in read(RUN / f"eval/{policy}.jsonl"):
        if row["sample"]:
            count = best_seen(row["numbers"], seen)
            groups["never" if count == 0 else "rarely" if count < RARE else "often"].append(row)
    for name, rows in sorted(groups.items()):
        hands = {tuple(sorted(row["numbers"])) for row in rows}
        print(f"{policy}, {name} shown: {len(hands)} hands, accuracy {sum(r['correct'] for r in rows) / len(rows):.3f}")
