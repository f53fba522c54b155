"""The Python of the README runs, and TRL trains with reward.py on two processes."""

import re
import shutil
import subprocess
import sys

import pytest
from commands import DATA, ENVIRONMENT, ROOT, TRAINED, done, load, read

BLOCKS = {language: re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
          for language, name in (("en", "README.md"), ("zh", "README.zh.md"))}
OWN_REWARD, OWN_DATA = BLOCKS["en"]
TRL = r"""
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import reward

# for a test on a CPU: leave it out on a GPU
SMALL = dict(use_cpu=True, bf16=False, max_steps=2, per_device_train_batch_size=4, num_generations=4,
             max_completion_length=16, logging_steps=1, report_to=[])
tokenizer = AutoTokenizer.from_pretrained("runs/game24/export")
data = load_dataset("json", data_files="runs/game24/data/train.jsonl", split="train").remove_columns("completion")
as_chat = tokenizer.chat_template is not None
data = data.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}] if as_chat
                             else row["prompt"] + "\n"})
GRPOTrainer("runs/game24/export", reward_funcs=reward.game24, train_dataset=data, processing_class=tokenizer,
            args=GRPOConfig(output_dir="runs/trl", **SMALL)).train()
"""


def test_both_languages_have_the_same_code():
    without_comments = [[re.sub(r" *#.*", "", block) for block in blocks] for blocks in BLOCKS.values()]
    assert without_comments[0] == without_comments[1]


@pytest.fixture(scope="module")
def project(run, tmp_path_factory):
    """A folder with reward.py and a small finished run."""
    root = tmp_path_factory.mktemp("project")
    done(run("data_prep", out=root / "runs/game24", **DATA))
    done(run("sft", out=root / "runs/game24", **TRAINED))
    shutil.copytree(root / "runs/game24/sft", root / "runs/game24/export")
    shutil.copy(ROOT / "reward.py", root)
    return root


def execute(folder, code, *launcher) -> str:
    (folder / "script.py").write_text(code, encoding="utf-8")
    environment = {**ENVIRONMENT, "PYTHONPATH": str(folder)}
    command = [sys.executable, *launcher, "script.py"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_trl_trains_on_two_processes(project):
    execute(project, TRL, "-m", "torch.distributed.run", "--nproc_per_node", "2")
    steps = load(project / "runs/trl/checkpoint-2/trainer_state.json")["log_history"]
    assert [step["step"] for step in steps if "reward" in step] == [1, 2] and steps[0]["rewards/game24/mean"] > 0


def test_a_task_of_your_own_learns(run, tmp_path):
    for name in ("sft", "grpo", "eval", "reward"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    with open(tmp_path / "reward.py", "a", encoding="utf-8") as file:
        file.write(f"\n\n{OWN_REWARD}")
    execute(tmp_path, OWN_DATA)
    settings = {"task": "sort", "model": "tiny", "cwd": tmp_path}
    done(run(tmp_path / "sft.py", sft_steps=40, tiny_layers=2, **settings))
    done(run(tmp_path / "grpo.py", steps=2, prompts_per_step=4, eval_samples=1, max_new_tokens=8, **settings))
    log = read(tmp_path / "runs/sort/grpo/log.jsonl")
    assert 0 < log[1]["parts/places"] < 1 and log[1]["grad_norm"] > 0
    done(run(tmp_path / "eval.py", samples=1, max_new_tokens=8, **settings))
    assert load(tmp_path / "runs/sort/eval/metrics.json")["grpo"]["places"] > 0
