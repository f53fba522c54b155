"""What helps? GRPO with other constants, from one SFT policy: `make ablations`, after `make train`.

    python tests/ablations.py                                   # all variants, seeds 0 to 2: about 5 hours on one core
    python tests/ablations.py default answer --seeds=0,1        # only some; finished runs are not repeated

Each run is `make grpo eval` in runs/ablations/VARIANT-SEED, or `make distil eval` with as many completions as GRPO
generates. Prints a table of all finished runs, on the test split, and writes it to runs/ablations/table.md, next to a
figure of val accuracy against generated tokens.
"""

import subprocess
import sys
from pathlib import Path

import numpy
from commands import load, read
from matplotlib.figure import Figure

RUNS = Path("runs/ablations")
BASE = Path("runs/game24")          # every run uses its data and SFT policy
COMPLETIONS = 256                   # per step of GRPO, of which there are 30
VARIANTS = {
    "default": [],
    "group": ["BASELINE=group"],
    "none": ["BASELINE=none"],
    "batch": ["BASELINE=batch"],
    "answer": ["CREDIT=answer"],
    "textbook": ["BASELINE=group", "CREDIT=answer"],
    "rft": ["BASELINE=rft", "CREDIT=answer"],
    "length-off": ["LENGTH_WEIGHT=0"],
    "length-of-all": ["LENGTH_NEEDS_CORRECT=0"],
    "no-kl": ["BETA=0"],
    "entropy": ["ENTROPY_BONUS=0.01"],
    "new-reference": ["REFERENCE_EVERY=10"],
    # SFT on right completions of the SFT policy, or in a second round of the first one's: from scratch, or further on
    "distil": ["DISTIL_PROMPTS=7680", "MAX_EPOCHS=4"],
    "distil-twice": ["DISTIL_PROMPTS=3840", "MAX_EPOCHS=4"],
    "distil-on": ["DISTIL_PROMPTS=7680", "INIT_FROM={policy}", "MAX_EPOCHS=1", "SFT_LR=5e-4", "MUON_LR=5e-4"],
    "distil-on-twice": ["DISTIL_PROMPTS=3840", "INIT_FROM={policy}", "MAX_EPOCHS=1", "SFT_LR=5e-4", "MUON_LR=5e-4"]}


def run(variant: str, seed: str) -> None:
    folder, policy = f"{RUNS}/{variant}-{seed}", f"{BASE}/sft"
    if variant.startswith("distil"):
        for number in range(2 if variant.endswith("twice") else 1):
            constants = [constant.format(policy=policy) for constant in VARIANTS[variant]]
            make("distil", f"OUT={folder}{number * '/distil'}", f"SEED={seed}{number}", "DISTIL=1",
                 f"POLICIES=teacher={policy}", *constants)
            policy = f"{folder}{(number + 1) * '/distil'}/sft"
    else:
        make("grpo", f"OUT={folder}", f"SEED={seed}", f"SFT={policy}", *VARIANTS[variant])
        policy = f"{folder}/grpo"
    make("eval", f"OUT={folder}", f"SEED={seed}", f"POLICIES=grpo={policy}")


def make(*words: str) -> None:
    subprocess.run(["make", *words, f"DATA={BASE}/data"], check=True)


def correct(folder: Path) -> numpy.ndarray:
    """For each test prompt, the share of its sampled completions that are right."""
    rows = [row for row in read(folder / "eval/grpo.jsonl") if row["sample"]]
    return numpy.array([row["correct"] for row in rows]).reshape(-1, len({row["id"] for row in rows})).mean(0)


def verdict(folders: list[Path], defaults: list[Path]) -> str:
    """Verdict by the 95 % interval, over prompts, of the accuracy difference from the default with the same seeds."""
    difference = numpy.mean([correct(a) - correct(b) for a, b in zip(folders, defaults)], 0)
    draws = numpy.random.default_rng(0).integers(0, len(difference), (2000, len(difference)))
    low, high = numpy.percentile(difference[draws].mean(1), [2.5, 97.5])
    word = "better" if low > 0 else "worse" if high < 0 else "no difference seen"
    return f"{word} ({low:+.3f} to {high:+.3f})"


def main() -> None:
    options = [word for word in sys.argv[1:] if word.startswith("--seeds=")]
    seeds = options[-1].removeprefix("--seeds=").split(",") if options else ["0", "1", "2"]
    for seed in seeds:
        for variant in [word for word in sys.argv[1:] if not word.startswith("--")] or VARIANTS:
            run(variant, seed)

    axes = Figure(figsize=(8, 5)).subplots()
    table = ["| | seeds | accuracy (lowest–highest) | unfinished | tokens | last − best on val | against the default |",
             "|---|---|---|---|---|---|---|"]
    for color, variant in enumerate(VARIANTS):
        folders = sorted(path.parents[1] for path in RUNS.glob(f"{variant}-[0-9]*/eval/summary.json"))
        if not folders:
            continue
        means = [load(folder / "eval/metrics.json")["grpo"] for folder in folders]
        accuracy, unfinished, tokens = (numpy.array([mean[name] for mean in means])
                                        for name in ("accuracy", "unfinished", "mean_tokens"))
        runs = [load(folder / "grpo/summary.json") for folder in folders if (folder / "grpo").is_dir()]
        drops = [run["last_val_accuracy"] - run["best_val_accuracy"] for run in runs]
        defaults = [RUNS / folder.name.replace(variant, "default") for folder in folders]
        compared = variant != "default" and all((folder / "eval/summary.json").is_file() for folder in defaults)
        name = " ".join([variant, *VARIANTS[variant]]).format(policy="SFT")
        table.append(f"| {name} | {len(folders)} | {accuracy.mean():.3f} ({accuracy.min():.3f}–{accuracy.max():.3f}) | "
                     f"{unfinished.mean():.3f} | {tokens.mean():.0f} | {f'{numpy.mean(drops):.3f}' if runs else ''} | "
                     f"{verdict(folders, defaults) if compared else ''} |")
        if not runs:
            continue        # distilling has no val curve
        curves = []
        for folder in folders:
            log = read(folder / "grpo/log.jsonl")
            generated = numpy.cumsum([entry.get("tokens", 0) for entry in log]) * COMPLETIONS / 1e6
            curves.append([(x, entry["val_accuracy"]) for x, entry in zip(generated, log) if "val_accuracy" in entry])
        mean = [numpy.mean(points, 0) for points in zip(*curves)]        # over seeds, as far as all of them go
        label = " ".join(VARIANTS[variant]) or variant
        axes.plot(*zip(*mean), "o-" if color < 10 else "o--", color=f"C{color}", label=label)
    axes.set(xlabel="generated tokens, in millions", ylabel="val accuracy, mean over seeds")
    axes.legend(fontsize="small")
    axes.figure.savefig(RUNS / "val.png", dpi=120, bbox_inches="tight")
    (RUNS / "table.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n".join(table))


if __name__ == "__main__":
    main()
