"""Kills training at random moments, damages random checkpoints between, and compares the end with a run that nothing disturbed.

    make soak                                # 50 kills for each of four runs
    .venv/bin/python tests/soak.py 1 20      # seed 1, 20 kills each

SFT and GRPO of the tiny model, in fp32 and in NF4 with LoRA and 8-bit AdamW. A kill is SIGKILL, one in five SIGTERM. Before one in three
restarts the newest checkpoint gets a flipped bit, or a file of it is cut or removed, or the best policy in the run folder gets a
flipped bit; one whole checkpoint is always left.
"""

import contextlib
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import conftest  # noqa: F401  the scripts can be imported
from commands import Commands, done, read
from test_resume import DATA, GRPO, SFT, flip, same_runs

import sft

# Long enough for 50 kills, each after a second or two
RUNS = {("sft", "fp32"): {**SFT, "model": "tiny", "steps": 1500, "save_every": 5, "eval_every": 100},
        ("sft", "nf4-lora"): {**SFT, "model": "{}/sft", "lora_rank": 4, "steps": 700, "save_every": 5, "eval_every": 100},
        ("grpo", "fp32"): {**GRPO, "sft": "{}/sft", "steps": 400, "eval_every": 20},
        ("grpo", "nf4-lora"): {**GRPO, "sft": "{}/lora/sft", "steps": 250, "eval_every": 20}}


def spoil(path: Path, rng: random.Random) -> None:
    """Damages one file of a checkpoint or policy."""
    file = rng.choice(sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".pt", ".json") and file.stat().st_size))
    how = rng.choice([flip, lambda file: os.truncate(file, file.stat().st_size // 2), Path.unlink])
    how(file)


def damage_something(folder: Path, rng: random.Random) -> bool:
    """Damages the newest checkpoint or the copy of the best in the run folder, where the run can still go on without it."""
    whole = [step for step in sft.checkpoint_steps(folder) if not sft.damage(folder / f"step-{step}")]
    if len(whole) < 2 or whole[-1] - whole[-2] > 10:            # the last two saved: an older one is the best
        return False
    if rng.random() < 0.7 or not (folder / "manifest.json").exists():
        spoil(folder / f"step-{whole[-1]}", rng)
    else:
        flip(next(folder.glob("*.safetensors")))
    return True


def soak(run, script, settings, root, kills, rng):
    """Faults, steps lost at most to a kill and to a damaged checkpoint, of one run that is killed until the kills are used up."""
    folder, found = root / script, {"SIGKILL": 0, "SIGTERM": 0, "damaged": 0, "lost to a kill": 0, "lost to damage": 0}
    logged, damaged = -1, False
    for kill in range(kills + 1):
        process = run.start(script, out=root, limit=600, **settings)
        if kill < kills:
            time.sleep(rng.uniform(0.2, 3))
            number = signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL
            with contextlib.suppress(ProcessLookupError):           # it has ended
                os.kill(process, number)
        result = run.wait()
        on = re.search(r"goes on after step (\d+)", result.output)
        if on:
            name = "lost to damage" if damaged else "lost to a kill"
            found[name] = max(found[name], logged - int(on[1]))
        if kill == kills or result.code == 0:
            done(result)
            return found
        assert result.code in (-number, 128 + number), result.output
        found[number.name] += 1
        log = read(folder / "log.jsonl") if (folder / "log.jsonl").exists() else []
        logged = log[-1]["step"] if log else -1
        damaged = rng.random() < 1 / 3 and damage_something(folder, rng)
        found["damaged"] += damaged


def main():
    seed, kills = (int(word) for word in (sys.argv[1:] + ["0", "50"][len(sys.argv) - 1:]))
    with tempfile.TemporaryDirectory() as place:
        run, root, rng = Commands(Path(place)), Path(place), random.Random(seed)
        done(run("data_prep", out=root, **DATA))
        done(run("sft", out=root, model="tiny", **{**SFT, "steps": 150, "eval_every": 150, "lr": 0.003, "muon_lr": 0.003}))
        done(run("sft", out=root / "lora", data=root / "data", model=root / "sft", lora_rank=4, **{**SFT, "steps": 2}))
        for (script, weights), constants in RUNS.items():
            began, settings = time.time(), {name: str(value).format(root) for name, value in constants.items()} | {"data": root / "data"}
            run.start(script, out=root / f"{weights}-whole", limit=600, **settings)
            done(run.wait())
            found = soak(run, script, settings, root / f"{weights}-cut", kills, rng)
            same_runs(root / f"{weights}-cut" / script, root / f"{weights}-whole" / script, every=False)
            print(f"{script} {weights}: {found}, then bit for bit as undisturbed ({time.time() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
