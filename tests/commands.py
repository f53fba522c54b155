"""Runs the scripts as commands, for tests and for soak.py: each is a fork of a server that has imported torch already.

The import takes longer than most of these small commands. A fork runs the script's own file with its own argv. Nothing
has a time limit, so that a busy machine fails no test.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}

# Small settings: 16 training hands with a short trace each, of which 100 steps of SFT learn enough to earn some rewards
DATA = {"lowest": 3, "highest": 5, "val_hands": 3, "test_hands": 3, "traces_per_hand": 1, "max_trace_tokens": 80,
        "extra_hands": 0}
SFT = {"model": "tiny", "tiny_layers": 2, "batch_tokens": 512, "sft_steps": 12, "sft_eval_every": 3, "save_every": 2}
TRAINED = {**SFT, "sft_steps": 100, "sft_eval_every": 100, "save_every": 100}
GRPO = {"model": "tiny", "prompts_per_step": 3, "group_size": 6, "max_new_tokens": 70, "temperature": 1.2, "steps": 8,
        "eval_every": 2, "eval_samples": 1, "patience": 100, "warmup": 1, "lr": 2e-4}

SERVER = """
import gc, json, os, runpy, sys, traceback
import bitsandbytes, matplotlib.pyplot, openai, opencc, peft, pypinyin.constants, torch, torch.utils.tensorboard
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
gc.freeze()
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if not pid:
        output = os.open(job["output"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
            os.dup2(source, target)
        os.chdir(job["cwd"])
        sys.argv = job["argv"]
        sys.path.insert(0, os.path.dirname(sys.argv[0]))
        code = 0
        try:
            exec(job["before"])
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else print(stop.code) or 1
        except BaseException:
            code = traceback.print_exc() or 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)      # what an interpreter does at its end takes a second with torch
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Commands:
    """Runs one command at a time in a fork of the server."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       text=True, env=ENVIRONMENT)

    def start(self, script, *words, before="", cwd=ROOT, **constants) -> int:
        """Starts `python SCRIPT --name=value` and returns its process id; `before` is code that runs first in it."""
        self.count += 1
        self.output = self.folder / f"{self.count}.txt"
        path = script if isinstance(script, Path) else ROOT / f"{script}.py"
        constants = {"threads": 1, **constants}
        argv = [str(path), *map(str, words), *(f"--{name.lower()}={value}" for name, value in constants.items())]
        job = {"argv": argv, "output": str(self.output), "before": before, "cwd": str(cwd)}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait(self) -> SimpleNamespace:
        code = int(self.server.stdout.readline())
        return SimpleNamespace(code=code, output=self.output.read_text(encoding="utf-8"))

    def __call__(self, script, *words, **options) -> SimpleNamespace:
        self.start(script, *words, **options)
        return self.wait()

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()


def wrap(target: str, body: str) -> str:
    """Code that makes `body` run before each call of a function: `calls` lists the arguments of the calls so far."""
    module, _, name = target.rpartition(".")
    return f"""
import os, pkgutil
def wrap(module, name):
    real, calls = getattr(module, name), []
    def wrapped(*args, **kwargs):
        calls.append(args)
        {body}
        return real(*args, **kwargs)
    setattr(module, name, wrapped)
wrap(pkgutil.resolve_name({module!r}), {name!r})
"""


def die(target: str, condition: str, last_words: str = "0") -> str:
    return wrap(target, f"({condition}) and ({last_words}, os.kill(os.getpid(), 9))")


def done(result) -> str:
    """The output of a command that succeeded."""
    assert result.code == 0, result.output
    return result.output


def refused(result) -> str:
    """The output of a command that ended with a message, not with a traceback."""
    assert result.code > 0 and "Traceback" not in result.output, f"code {result.code}: {result.output}"
    return result.output


def killed(result) -> None:
    assert result.code == -signal.SIGKILL, result.output


def read(path: Path) -> list:
    """Objects of a jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def load(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, *rows) -> Path:
    """Writes rows, objects or text, as lines of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
