"""Runs the scripts as commands, for tests and for soak.py: forks of a process that has imported torch already.

The import takes longer than most of the small commands; each fork runs the script's own file with its own argv.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200", "PYTHONWARNINGS": "ignore"}
TIME_LIMIT = 60      # seconds of a command

SERVER = """
import gc, json, os, runpy, signal, sys, traceback
import bitsandbytes, matplotlib.pyplot, peft, torch, torch.utils.tensorboard
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, Qwen2Config, Qwen2ForCausalLM
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)        # a background job of a shell has them ignored
gc.collect()
gc.freeze()
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if not pid:
        signal.alarm(job["limit"])
        output = os.open(job["output"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
            os.dup2(source, target)
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
    """Runs one script at a time in a fork of the server."""

    def __init__(self, folder):
        self.folder, self.count, self.running = folder, 0, None
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)

    def start(self, script, *words, limit=TIME_LIMIT, before="", **constants):
        """Starts `python SCRIPT.py --name=value`, returns its process id. `before` is run in the process before the script."""
        if self.running:            # of a test that failed before it waited
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.running, signal.SIGKILL)
            self.wait()
        self.count += 1
        self.output = self.folder / f"{self.count}-{script}.txt"
        constants = constants if script == "data_prep" else {"threads": 1, **constants}
        argv = [str(ROOT / f"{script}.py"), *words, *(f"--{name.lower()}={value}" for name, value in constants.items())]
        self.server.stdin.write(json.dumps({"argv": argv, "output": str(self.output), "limit": limit, "before": before}) + "\n")
        self.server.stdin.flush()
        self.running = int(self.server.stdout.readline())
        return self.running

    def wait(self):
        code, self.running = int(self.server.stdout.readline()), None
        return SimpleNamespace(code=code, output=self.output.read_text(encoding="utf-8"))

    def __call__(self, script, *words, **constants):
        self.start(script, *words, **constants)
        return self.wait()


def done(result):
    """The output of a command that succeeded."""
    assert result.code == 0, result.output
    return result.output


def refused(result):
    """The output of a command that ended with a message: no success, no traceback, not its time limit."""
    assert result.code > 0 and "Traceback" not in result.output, f"code {result.code}: {result.output}"
    return result.output


def read(path):
    """Objects of a jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(path, *rows):
    """Writes rows, objects or text, as lines of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path
