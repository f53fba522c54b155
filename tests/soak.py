"""Kills training at random moments, damages checkpoints in between, and compares the result with an undisturbed run.

    make soak                                # up to 50 kills for each of four runs
    .venv/bin/python tests/soak.py 1 20      # seed 1, 20 kills

SFT and GRPO of the tiny model, in fp32 and in NF4 with LoRA and 8-bit AdamW. Before one in three restarts, the newest
checkpoint has a bit flipped, or is truncated or emptied.
"""

import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import conftest  # noqa: F401  makes the scripts importable
from commands import DATA, GRPO, SFT, TRAINED, Commands, done
from test_resume import LORA, empty, flip, halve, same_runs

LONG_SFT = {**SFT, "sft_eval_every": 50, "save_every": 5}
LONG_GRPO = {**GRPO, "eval_every": 20}
RUNS = {("sft", "fp32"): {**LONG_SFT, "sft_steps": 1000},
        ("sft", "lora"): {**LONG_SFT, **LORA, "init_from": "{}/sft", "sft_steps": 500},
        ("grpo", "fp32"): {**LONG_GRPO, "sft": "{}/sft", "steps": 200},
        ("grpo", "lora"): {**LONG_GRPO, **LORA, "sft": "{}/lora/sft", "steps": 100}}


def soak(run: Commands, script: str, constants: dict, kills: int, rng: random.Random) -> dict[str, int]:
    """Runs a script to its end, killing it up to `kills` times; counts the kills and the damaged checkpoints."""
    count = {"kills": 0, "damaged": 0}
    while count["kills"] < kills:
        process = run.start(script, **constants)
        time.sleep(rng.uniform(0.2, 3))
        with contextlib.suppress(ProcessLookupError):           # it has already ended
            os.kill(process, signal.SIGKILL)
        result = run.wait()
        if result.code == 0:
            return count
        assert result.code == -signal.SIGKILL, result.output
        count["kills"] += 1
        checkpoints = sorted(Path(constants["out"], script).glob("step-*.pt"))
        if len(checkpoints) > 1 and rng.random() < 1 / 3:
            rng.choice([flip, halve, empty])(checkpoints[-1])
            count["damaged"] += 1
    done(run(script, **constants))
    return count


def main() -> None:
    seed, kills = map(int, sys.argv[1:] or (0, 50))
    with tempfile.TemporaryDirectory() as place:
        root, rng = Path(place), random.Random(seed)
        run = Commands(root)
        done(run("data_prep", out=root, **DATA))
        done(run("sft", out=root, **TRAINED))
        done(run("sft", out=root / "lora", data=root / "data", init_from=root / "sft", **{**SFT, **LORA}))
        for (script, weights), constants in RUNS.items():
            began, folders = time.time(), [root / f"{weights}-undisturbed", root / f"{weights}-killed"]
            constants = {name: str(value).format(root) for name, value in constants.items()} | {"data": root / "data"}
            done(run(script, out=folders[0], **constants))
            count = soak(run, script, {**constants, "out": folders[1]}, kills, rng)
            same_runs(folders[0] / script, folders[1] / script)
            seconds = time.time() - began
            print(f"{script} {weights}: {count}, then bit for bit as if undisturbed ({seconds:.0f} s)", flush=True)
        run.close()


if __name__ == "__main__":
    main()
