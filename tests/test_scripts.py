"""The real commands, small, on a CPU: data_prep, sft, grpo and eval through make and one by one, in fp32 and in NF4 with LoRA.

`make train` runs once, as a user runs it; the other commands are those of commands.py.
"""

import ast
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import combinations_with_replacement
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import ENVIRONMENT, ROOT, TIME_LIMIT, done, load, read, refused, write
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import data_prep
import eval as evaluation
import reward
import sft

SCRIPTS = ("data_prep", "sft", "grpo", "eval")
TOKENS = 80          # enough for the shortest traces

# Eight training hands with one trace each: 100 steps of SFT learn enough of them for rewards above 0. It evaluates at its end alone,
# because the best policy on val would be an early one.
SMALL_DATA = {"LOWEST": 3, "HIGHEST": 5, "VAL_HANDS": 3, "TEST_HANDS": 3, "TRACES_PER_HAND": 1, "MAX_TRACE_TOKENS": TOKENS}
SMALL_SFT = {"BATCH_TOKENS": 512, "EVAL_ROWS": 3, "MAX_NEW_TOKENS": TOKENS}
SMALL_GRPO = {"PROMPTS_PER_STEP": 4, "GROUP_SIZE": 12, "MAX_NEW_TOKENS": TOKENS, "TEMPERATURE": 1.2}      # so that rewards differ
TRAIN = {**SMALL_DATA, **SMALL_SFT, **SMALL_GRPO, "MODEL": "tiny", "SFT_STEPS": 100, "SFT_LR": 0.003, "MUON_LR": 0.003, "STEPS": 3, "EVAL_EVERY": 100,
         "SFT_EVAL_EVERY": 100, "SAMPLES": 2, "BOOTSTRAP": 100, "EVAL_BATCH_TOKENS": 300, "THREADS": 1}

def make(*words, **constants):
    # the environment of the test is the environment of the scripts: never install anything from here
    words = ["make", "-o", ".venv/ready", "-o", ".venv/ready-dev", *words, *(f"{name}={value}" for name, value in constants.items())]
    result = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return SimpleNamespace(code=result.returncode, output=result.stdout)


def row(*numbers, **fields):
    hand = {"numbers": list(numbers)}
    completion = data_prep.write_trace(list(numbers), 24, data_prep.random.Random(0))
    return {"id": "x", "prompt": reward.prompt("game24", hand), "completion": completion, **hand, **fields}


def constants_of(script):
    """Names and values of the constants of a script and of reward.py, read from their source."""
    found = {}
    for name in ("reward", script):
        for node in ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign):
                several = isinstance(node.targets[0], ast.Tuple)
                pairs = zip(node.targets[0].elts, node.value.elts) if several else [(node.targets[0], node.value)]
                for target, value in pairs:
                    number = value.operand if isinstance(value, ast.UnaryOp) else value
                    if target.id.isupper() and isinstance(number, ast.Constant):
                        found[target.id] = ast.literal_eval(value)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of `make train`, small."""
    root = tmp_path_factory.mktemp("make") / "run"
    (root.parent / "make.txt").write_text(done(make("train", OUT=root, **TRAIN)), encoding="utf-8")
    return root


@pytest.fixture
def root(trained, tmp_path):
    """A copy of the trained run that a test may change."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def pretrained(trained, tmp_path_factory):
    """The SFT policy as if it were a model of somebody else: with a chat template, and with two EOS ids as Qwen3 has them."""
    folder = tmp_path_factory.mktemp("pretrained")
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(trained / "sft" / name, folder)
    config = load(folder / "config.json")
    assert config.pop("tiny")
    write(folder / "config.json", config)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{{ '\n' }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    settings = load(folder / "generation_config.json")
    settings["eos_token_id"] = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("</think>")]
    write(folder / "generation_config.json", settings)
    return folder


@pytest.fixture(scope="module")
def lora(run, trained, pretrained, tmp_path_factory):
    """sft, grpo and eval of the pretrained model in NF4 with LoRA; the data is that of `make train`."""
    root = tmp_path_factory.mktemp("lora")
    options = {"out": root, "data": trained / "data", "load_4bit": 1}
    done(run("sft", **options, model=pretrained, lora_rank=4, steps=10, lr=0.002, **SMALL_SFT))
    done(run("grpo", **options, lora_rank=4, steps=2, lr=0.003, warmup=1, save_every=2, **SMALL_GRPO))
    done(run("eval", **options, bf16=0, samples=2, bootstrap=100, max_new_tokens=TOKENS))
    return root


def greedy_texts(folder, rows):
    """Greedy completions of prompts by transformers alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    texts = []
    for row in rows:
        ids = tokenizer(row["prompt"] + "\n", return_tensors="pt").input_ids
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
        texts.append(tokenizer.decode(output[0, ids.shape[1]:], skip_special_tokens=True))
    return texts


def again(run, folder, script, **changed):
    """Runs a finished stage again with the constants that it stored, some of them changed."""
    return run(script, **{**load(folder / "run.json")["constants"], **{name.upper(): value for name, value in changed.items()}})


# The whole pipeline, in fp32


def test_every_stage_is_complete_and_stores_what_it_ran(trained):
    for script, folder in zip(SCRIPTS, ("data", "sft", "grpo", "eval")):
        assert load(trained / folder / "summary.json")
        header = load(trained / folder / "run.json")
        assert set(header["constants"]) == set(constants_of(script))
        assert {"torch", "transformers", "peft", "bitsandbytes"} <= set(header["versions"]) and header["device"] == "cpu"
        given = {name: value for name, value in TRAIN.items() if name in header["constants"] and not (script == "sft" and f"SFT_{name}" in TRAIN)}
        assert {name: header["constants"][name] for name in given} == given
        assert (trained / folder / f"{script}.py").is_file() and (trained / folder / "reward.py").is_file()
    of_sft = {name[4:]: value for name, value in TRAIN.items() if name.startswith("SFT_")}
    assert {name: load(trained / "sft/run.json")["constants"][name] for name in of_sft} == of_sft
    leftovers = [path for path in trained.rglob("*") if path.suffix == ".tmp" or path.name == "saving"]
    assert not leftovers
    assert "BETA = 0.01\n" in (trained.parent / "make.txt").read_text(encoding="utf-8")      # all constants are printed


def test_sft_log(trained):
    log = read(trained / "sft/log.jsonl")
    assert [entry["step"] for entry in log] == list(range(1, 101))
    assert all({"loss", "grad_norm", "lr", "tokens_per_s", "peak_gib"} <= set(entry) for entry in log)
    evaluated = [entry for entry in log if "val_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [100]
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    summary = load(trained / "sft/summary.json")
    assert summary["best_val_loss"] == min(entry["val_loss"] for entry in evaluated)


def test_grpo_log(trained):
    first, *log = read(trained / "grpo/log.jsonl")
    needed = {"reward", "outcome", "process", "length", "reward_std", "running_mean", "running_std", "momentum", "accuracy", "unfinished", "wrong",
              "tokens", "tokens_p50", "tokens_p95", "lines", "kl", "entropy", "clip_fraction", "ratio_error", "grad_norm", "zero_variance",
              "rollout_tokens_per_s", "update_tokens_per_s", "peak_gib"}
    assert first["step"] == 0 and "val_accuracy" in first and "val_accuracy" in log[-1]
    assert [entry["step"] for entry in log] == [1, 2, 3]
    for entry in log:
        assert needed <= set(entry)
        assert ("tokens_right" in entry) == (entry["accuracy"] > 0) and ("tokens_wrong" in entry) == (entry["accuracy"] < 1)
        assert entry["accuracy"] + entry["unfinished"] + entry["wrong"] == pytest.approx(1)
        assert entry["reward"] == pytest.approx(0.55 * entry["outcome"] + 0.30 * entry["process"] + 0.15 * entry["length"])
    assert log[0]["kl"] == 0 and log[0]["ratio_error"] <= 1e-4
    assert all(entry["reward"] > 0 and entry["grad_norm"] > 0 for entry in log) and log[-1]["kl"] > 0      # it trains
    assert [entry["momentum"] for entry in log] == pytest.approx([0, 0.01, 0.02])
    assert log[1]["running_mean"] == pytest.approx(0.01 * log[0]["running_mean"] + 0.99 * log[1]["reward"])
    samples = read(trained / "grpo/samples.jsonl")
    assert len(samples) == 4 and all({"step", "prompt", "completion", "scores", "advantage"} <= set(sample) for sample in samples)


@pytest.mark.parametrize("stage, tags", [("sft", {"loss", "val_loss"}), ("grpo", {"reward", "kl", "entropy", "grad_norm", "val_accuracy"})])
def test_tensorboard_has_the_log(trained, stage, tags):
    events = EventAccumulator(str(trained / stage / "tensorboard")).Reload()
    assert tags <= set(events.Tags()["scalars"])
    log = read(trained / stage / "log.jsonl")
    for tag in tags:
        assert [event.value for event in events.Scalars(tag)] == pytest.approx([entry[tag] for entry in log if tag in entry], rel=1e-5)


def test_metrics_are_those_of_the_completions(trained):
    metrics = load(trained / "eval/metrics.json")
    assert list(metrics) == ["sft", "grpo"]
    for name, values in metrics.items():
        assert {"accuracy", "accuracy_ci", "unfinished", "wrong", "mean_tokens", "median_tokens", "process", "n"} <= set(values)
        completions = read(trained / f"eval/{name}.jsonl")
        greedy, sampled = completions[:3], completions[3:]
        assert values["n"] == len(sampled) == 3 * TRAIN["SAMPLES"]
        assert values["accuracy"] == pytest.approx(sum(c["correct"] for c in sampled) / 6)
        assert values["unfinished"] == pytest.approx(1 - sum(c["answered"] for c in sampled) / 6)
        assert values["mean_tokens"] == pytest.approx(sum(c["tokens"] for c in sampled) / 6)
        assert values["process"] == pytest.approx(sum(c["process"] for c in sampled) / 6)
        assert values["accuracy"] + values["unfinished"] + values["wrong"] == pytest.approx(1)
        assert values["accuracy_ci"][0] <= values["accuracy"] <= values["accuracy_ci"][1]
        assert [c["prompt"] for c in greedy] == [r["prompt"] for r in read(trained / "data/test.jsonl")]


def test_report_shows_the_table_and_the_figures(trained):
    text = (trained / "eval/report.md").read_text(encoding="utf-8")
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert sorted(images) == sorted(path.name for path in (trained / "eval").glob("*.png")) and len(images) == 3
    for name in images:
        with Image.open(trained / "eval" / name) as image:
            assert min(image.size) > 200
            low, high = image.convert("L").getextrema()
            assert high - low > 100
    assert re.search(r"^\| sft \|", text, re.MULTILINE) and re.search(r"^\| grpo \|", text, re.MULTILINE) and "**grpo**" in text
    assert "| grpo | " in (trained.parent / "make.txt").read_text(encoding="utf-8")      # the table is printed as well


def test_plots_and_ask(run, root):
    (root / "eval/accuracy.png").unlink()
    done(run("eval", out=root, plots_only=1))
    assert (root / "eval/accuracy.png").stat().st_size > 5000
    output = done(run("eval", out=root, ask="5 3 4 4", max_new_tokens=20))
    for name in ("sft", "grpo"):
        assert re.search(rf"=== {name}: Make 24 from 5 3 4 4\n.+--- {name}: (right|wrong|unfinished), \d+ tokens", output, re.DOTALL)
    assert "four positive integers" in refused(run("eval", out=root, ask="5 3 4"))


def test_export_gives_the_greedy_text_of_the_policy(run, trained, tmp_path):
    done(run("eval", out=trained, export=tmp_path / "export"))
    rows = read(trained / "data/test.jsonl")
    assert greedy_texts(tmp_path / "export", rows) == [c["completion"] for c in read(trained / "eval/grpo.jsonl")[:3]]


# A second run


def test_second_make_train_does_nothing_and_with_another_constant_names_both_values(trained):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    assert ".py" not in done(make("train", OUT=trained, **TRAIN))
    assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    result = make("train", OUT=trained, BETA=0.5, **TRAIN)
    assert result.code and "BETA was 0.01 and is 0.5" in result.output and "RESUME=0" in result.output and "sft.py" not in result.output


@pytest.mark.parametrize("script", SCRIPTS)
def test_finished_stage(run, trained, script):
    folder = trained / ("data" if script == "data_prep" else script)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert "nothing to do" in done(again(run, folder, script))
    output = refused(again(run, folder, script, seed=7))
    assert "SEED was 0 and is 7" in output and "OUT=" in output and "RESUME=0" in output
    assert "WELL_FORMED was 0.35 and is 0.25" in refused(again(run, folder, script, well_formed=0.25))
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resume_0_replaces_and_what_depends_on_it_says_so(run, root):
    done(again(run, root / "sft", "sft", out=root, resume=0, steps=1))
    assert load(root / "sft/summary.json")["steps"] == 1 and len(read(root / "sft/log.jsonl")) == 1
    assert "model.safetensors was" in refused(again(run, root / "grpo", "grpo", out=root))
    done(again(run, root / "data", "data_prep", out=root, resume=0, seed=1))
    assert "train.jsonl was" in refused(again(run, root / "sft", "sft", out=root, resume=1))


def test_greedy_results_do_not_depend_on_the_batch_size(run, root, trained):
    done(again(run, root / "eval", "eval", out=root, resume=0, eval_batch_tokens=1))
    for name in ("sft", "grpo"):
        assert read(root / f"eval/{name}.jsonl")[:3] == read(trained / f"eval/{name}.jsonl")[:3]


def test_make_train_goes_on_after_kills_and_ends_with_the_same_metrics(trained, tmp_path):
    """SIGKILL to make and all that it started: in SFT, in GRPO and in the evaluation. Then `make train` as an undisturbed run."""
    root = tmp_path / "run"
    shutil.copytree(trained / "data", root / "data")
    shutil.copy(trained / ".data_prep.flags", root)
    words = ["make", "-o", ".venv/ready", "train", f"OUT={root}", *(f"{name}={value}" for name, value in TRAIN.items())]
    for until in (lambda: len(read(root / "sft/log.jsonl")) > 30, lambda: len(read(root / "grpo/log.jsonl")) > 1, (root / "eval/sft.jsonl").is_file):
        process = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        waited = time.time() + TIME_LIMIT
        while time.time() < waited:
            with contextlib.suppress(FileNotFoundError, ValueError):
                if until():
                    break
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    output = done(make("train", OUT=root, **TRAIN))
    assert "sft.py" not in output and "grpo.py" not in output
    metrics, expected = load(root / "eval/metrics.json"), load(trained / "eval/metrics.json")
    assert [m.pop("seconds") > 0 for m in (*metrics.values(), *expected.values())] == 4 * [True]
    assert metrics == expected
    for name in ("sft", "grpo"):
        assert (root / name / "model.safetensors").read_bytes() == (trained / name / "model.safetensors").read_bytes()


def test_a_policy_of_the_tiny_model_is_known_as_such_wherever_it_lies(run, trained, tmp_path):
    shutil.copytree(trained / "grpo", tmp_path / "policy", ignore=shutil.ignore_patterns("run.json", "step-*"))
    output = done(run("sft", out=tmp_path, data=trained / "data", model=tmp_path / "policy", steps=1, **SMALL_SFT))
    assert "LORA_RANK = 0\n" in output and "LOAD_4BIT = 0\n" in output
    output = done(run("grpo", out=tmp_path, data=trained / "data", sft=tmp_path / "policy", steps=1, **SMALL_GRPO))
    assert "LORA_RANK = 0\n" in output and "TOP_P = 1.0\n" in output
    settings = {"samples": 1, "bootstrap": 10, "max_new_tokens": 5}
    assert "BF16 = 0\n" in done(run("eval", out=tmp_path, data=trained / "data", policies=f"mine={tmp_path / 'policy'}", **settings))


def test_grpo_refuses_a_killed_sft(run, root):
    (root / "sft/summary.json").unlink()       # a policy of an earlier evaluation may be there, the run is not finished
    assert "make sft" in refused(run("grpo", out=root, resume=0, steps=1, **SMALL_GRPO))


def test_foreign_files_are_not_deleted(run, trained, tmp_path):
    note = write(tmp_path / "sft/thesis.txt", "mine")
    assert "OUT=" in refused(run("sft", out=tmp_path, data=trained / "data", model="tiny", resume=0, steps=1))
    assert note.read_text(encoding="utf-8") == "mine\n"


# NF4 with LoRA, a chat template and two EOS ids; all weights of a model


def test_lora_policies_are_adapters_of_the_base(lora, pretrained):
    for folder in (lora / "sft", lora / "grpo", lora / "grpo/step-2"):
        config = load(folder / "adapter_config.json")
        assert (config["r"], config["base_model_name_or_path"]) == (4, str(pretrained))
        assert not (folder / "model.safetensors").exists() and not (folder / "reference").exists()
    assert (lora / "sft/adapter_model.safetensors").read_bytes() != (lora / "grpo/step-2/adapter_model.safetensors").read_bytes()


def test_lora_grpo_log(lora):
    _, first, second = read(lora / "grpo/log.jsonl")
    assert first["kl"] == 0 and first["ratio_error"] <= 1e-4      # the reference is the SFT adapter, not the base
    assert first["grad_norm"] > 0 and second["kl"] > 0


def test_every_eos_id_ends_a_completion(lora):
    completions = [c["completion"] for name in ("sft", "grpo") for c in read(lora / f"eval/{name}.jsonl")]
    thought = [text for text in completions if "</think>" in text]
    assert thought and all(text.endswith("</think>") for text in thought)


def test_export_merges_the_adapter_exactly(run, trained, lora, pretrained, tmp_path, monkeypatch):
    done(run("eval", out=lora, load_4bit=1, export=tmp_path / "export"))
    assert not list((tmp_path / "export").glob("adapter*")) and "quantization_config" not in load(tmp_path / "export/config.json")
    rows = read(trained / "data/test.jsonl")
    assert greedy_texts(tmp_path / "export", rows) == [c["completion"] for c in read(lora / "eval/grpo.jsonl")[:3]]
    monkeypatch.setattr(evaluation, "BF16", 0)
    policy, tokenizer = evaluation.load_model(str(lora / "grpo"), trainable=False)
    ids = torch.tensor([tokenizer(rows[0]["prompt"] + "\n" + rows[0]["completion"]).input_ids])
    with torch.no_grad():
        expected = policy.eval()(ids).logits
        exported, base = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (tmp_path / "export", pretrained))
    assert (exported - expected).abs().max() < 1e-4 < 1e-2 < (base - expected).abs().max()


@pytest.mark.parametrize("lr, moved", [(0, False), (0.03, True)])
def test_second_update_on_a_rollout_is_clipped_where_the_policy_moved(run, trained, lora, tmp_path, lr, moved):
    """With LR=0 the second update compares the log-probs of the update with the old ones, both after a rollout in 4 bits."""
    done(run("grpo", out=tmp_path, sft=lora / "sft", data=trained / "data", steps=1, updates_per_rollout=2, lr=lr, warmup=1, **SMALL_GRPO))
    log = read(tmp_path / "grpo/log.jsonl")[1]
    assert log["grad_norm"] > 0
    if moved:
        assert log["clip_fraction"] > 0 and log["ratio_error"] > 0.2 and log["kl"] > 0
    else:
        assert log["clip_fraction"] == 0 and log["ratio_error"] <= 1e-4 and log["kl"] == 0


@pytest.mark.parametrize("load_4bit, rank, saved", [(1, 4, "adapter_model.safetensors"), (0, 0, "model.safetensors")])
def test_grpo_from_a_plain_model(run, trained, pretrained, tmp_path, load_4bit, rank, saved):
    options = {"load_4bit": load_4bit, "lora_rank": rank, "lr": 0.001, "warmup": 1, "save_every": 2, **SMALL_GRPO}
    done(run("grpo", out=tmp_path, sft=pretrained, data=trained / "data", steps=2, **options))
    _, first, second = read(tmp_path / "grpo/log.jsonl")
    assert first["kl"] == 0 and first["grad_norm"] > 0 and second["kl"] > 0
    assert [path.name for path in (tmp_path / "grpo/step-2").glob("*.safetensors")] == [saved]
    assert (tmp_path / "grpo/step-2" / saved).read_bytes() != (tmp_path / "grpo" / saved).read_bytes() or load(
        tmp_path / "grpo/summary.json")["best_step"] == 2


def test_all_weights_in_4_bits_are_refused(run, trained, pretrained, tmp_path):
    output = refused(run("sft", out=tmp_path, data=trained / "data", model=pretrained, load_4bit=1, lora_rank=0))
    assert "LORA_RANK=0" in output and "LOAD_4BIT=0" in output


# The command line


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_constant_with_its_default(run, script):
    output = " ".join(done(run(script, "--help")).split())
    for name, value in constants_of(script).items():
        assert re.search(rf"--{name.lower()} \w+ \({re.escape(' '.join(repr(value).split()))}[,)]", output), name


@pytest.mark.parametrize("script, word, near", [
    ("data_prep", "--hold_out=x", "--holdout"), ("sft", "--step=3", "--steps"), ("grpo", "--betta=0", "--beta"),
    ("eval", "--sample=2", "--samples"), ("grpo", "--qqqqq=1", "--help")])
def test_unknown_constant_is_refused_with_the_nearest(run, tmp_path, script, word, near):
    output = refused(run(script, word, out=tmp_path))
    assert f"no constant {word[2:].split('=')[0].upper()}" in output and near in output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script, word", [("data_prep", "--seed=one"), ("sft", "--steps=1e3"), ("grpo", "--beta=none"), ("eval", "--samples=4.5")])
def test_wrong_type_is_named(run, tmp_path, script, word):
    name, value = word.split("=")
    output = refused(run(script, word, out=tmp_path))
    assert name in output and repr(value) in output and ("float" if name == "--beta" else "int") in output


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_task_names_the_choices(run, tmp_path, script):
    output = refused(run(script, out=tmp_path, task="chess"))
    assert "'chess'" in output and "game24" in output


@pytest.mark.parametrize("name, choices", [("baseline", ("momentum", "group", "none", "batch")), ("aggregate", ("sequence", "token", "constant"))])
def test_unknown_choice_names_the_choices(run, trained, tmp_path, name, choices):
    output = refused(run("grpo", out=tmp_path, sft=trained / "sft", data=trained / "data", steps=1, **SMALL_GRPO, **{name: "wrong"}))
    assert name.upper() in output.splitlines()[-1] and all(choice in output.splitlines()[-1] for choice in choices)


@pytest.mark.parametrize("script, option", [("sft", "model"), ("grpo", "sft"), ("eval", "policies")])
def test_hub_model_out_of_reach(run, trained, tmp_path, script, option):
    name = "Qwen/Qwen2.5-0.5B-Instruct-that-is-not-there"
    output = refused(run(script, out=tmp_path, data=trained / "data", **{option: f"base={name}" if script == "eval" else name}))
    assert name in output and "MODEL=tiny" in output and "folder" in output


# make


def planned(*words, **constants):
    """Words after the name of each script that make would run."""
    output = done(make("-n", *words, **constants))
    return {script: shlex.split(words) for script, words in re.findall(r"^\S*python (\w+)\.py(.*)$", output, re.MULTILINE)}


def test_make_gives_constants_to_the_scripts_that_have_them(tmp_path):
    words = planned("train", BETA=0, STEPS=50, SFT_STEPS=10, SFT_LR=0.5, SEED=3, OUT=tmp_path, TASK="game24")
    every = {"--seed=3", f"--out={tmp_path}", "--task=game24"}
    assert {script: set(given) for script, given in words.items()} == {
        "data_prep": every, "sft": {*every, "--steps=10", "--lr=0.5"}, "grpo": {*every, "--beta=0", "--steps=50"}, "eval": every}


def test_make_ablation_uses_the_data_and_the_policy_that_exist(trained, tmp_path):
    words = planned("grpo", "eval", OUT=tmp_path, SFT=trained / "sft", DATA=trained / "data", BETA=0)
    shared = {f"--out={tmp_path}", f"--sft={trained / 'sft'}", f"--data={trained / 'data'}"}
    assert {script: set(given) for script, given in words.items()} == {"grpo": {*shared, "--beta=0"}, "eval": shared}


def test_make_runs_again_what_resume_0_names_and_nothing_else(trained):
    unchanged = [word for script in SCRIPTS for word in ("-o", trained / f".{script}.flags")]
    every = set(SCRIPTS)
    for words, expected in ((["train"], set()), (["grpo", "RESUME=0"], {"grpo"}), (["train", "RESUME=0"], every), (["data", "RESUME=1"], set())):
        assert set(planned(*unchanged, *words, OUT=trained, **TRAIN)) == expected


def test_make_asks_a_finished_run_for_hands_whatever_it_was_trained_with(trained, tmp_path):
    hands = write(tmp_path / "hands.txt", "1 1 11 11")
    planned = make("-n", "eval", OUT=trained, HANDS=hands).output          # without the constants of the training
    assert "eval.py" in planned and "grpo.py" not in planned and "sft.py" not in planned and "data_prep.py" not in planned
    assert "grpo.py" in make("-n", "eval", OUT=tmp_path, HANDS=hands).output


def test_make_notices_a_changed_file_of_hands_and_needs_no_run_for_other_policies(trained, tmp_path):
    hands = write(tmp_path / "hands.txt", "1 1 11 11")
    (tmp_path / "eval-hands").mkdir()
    write(tmp_path / "eval-hands/summary.json", "{}")
    options = {"OUT": tmp_path, "DATA": trained / "data", "HANDS": hands, "POLICIES": f"mine={trained / 'sft'}"}
    flags = ["-o", tmp_path / ".eval.flags", "eval"]
    assert planned(*flags, **options) == {}
    os.utime(hands, (time.time() + 10, time.time() + 10))
    assert set(planned(*flags, **options)) == {"eval"}
    result = make("eval", HANDS="my hands.txt")
    assert result.code and "HANDS must be a path without spaces, not my hands.txt" in result.output


def test_make_ask_and_export(tmp_path):
    assert planned("ask", OUT=tmp_path, Q="1 5 5 5")["eval"] == [f"--out={tmp_path}", "--ask=1 5 5 5"]
    assert planned("export", OUT=tmp_path)["eval"] == [f"--out={tmp_path}", f"--export={tmp_path}/export"]
    assert planned("plots", OUT=tmp_path)["eval"] == [f"--out={tmp_path}", "--plots_only=1"]


@pytest.mark.parametrize("name, near", [("BETTA", "BETA"), ("SFT_STEP", "SFT_STEPS"), ("STEP", "STEPS")])
def test_make_refuses_an_unknown_constant_at_once(name, near):
    result = make("train", **{name: 0})
    assert result.code and re.search(rf"no script has a constant {name}; nearest:.* {near}\b", result.output) and ".py" not in result.output


def test_make_help_lists_the_targets():
    output = done(make("help"))
    for target in ("train", "data", "sft", "grpo", "eval", "plots", "ask", "export", "judge", "qwen-lora", "qwen-cot-lora", "ds-lora", "ds-rl",
                   "test", "lint", "soak", "audit", "clean", "help"):
        line, = re.findall(rf"^make {target} +(.+)$", output, re.MULTILINE)
        comment, = re.findall(rf"^{target}:.*## (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert line == comment


# Bad input


@pytest.mark.parametrize("script, missing, command", [
    ("sft", "data", "make data"), ("grpo", "sft", "make sft"), ("grpo", "data", "make data"), ("eval", "sft", "make sft"),
    ("eval", "grpo", "make grpo"), ("eval", "data", "make data")])
def test_missing_input_names_the_command_that_makes_it(run, root, script, missing, command):
    shutil.rmtree(root / missing)
    output = refused(run(script, out=root, **({"model": "tiny"} if script == "sft" else {})))
    assert str(root / missing) in output and command in output


@pytest.mark.parametrize("script, option", [("data_prep", "holdout"), ("eval", "hands")])
def test_missing_file_of_hands_is_named(run, root, script, option):
    assert f"{root}/none.txt" in refused(run(script, out=root, resume=0, **{option: f"{root}/none.txt"}))


BAD_NUMBERS = ("[1, 2, 3]", '["1", "2", "3", "4"]', "[0, 1, 2, 3]", "[-1, 1, 2, 3]", "[1, 2, 3, 4.0]", "[1, 2, 3, true]", "null")


@pytest.mark.parametrize("line, reason", [
    ('{"prompt": "x", "completion": "y"', "delimiter"), ("[1, 2]", "an object is expected, not list"), ("x", "Expecting value"),
    ('{"id": "x", "prompt": "x", "completion": "y", "numbers": [1, 2, 3, 4]}', "the id 'x' is that of line 1 too"),
    ('{"prompt": "x", "prompt": "y", "completion": "y", "numbers": [1, 2, 3, 4]}', "the key 'prompt' is there twice"),
    ('{"prompt": "x", "completion": "y", "numbers": [1, 2, 3, NaN]}', "NaN is no number"),
    ('{"prompt": "x", "completion": "\\ud83d half", "numbers": [1, 2, 3, 4]}', "surrogates not allowed"),
    ("[" * 100000, "recursion"), ('{"prompt": "x", "completion": "y", "numbers": [1, 2, 3, 4]}'.encode("utf-16"), "utf-8"),
    ('{"completion": "y", "numbers": [1, 2, 3, 4]}', "'prompt' must be a text"),
    ('{"prompt": "x", "completion": "", "numbers": [1, 2, 3, 4]}', "'completion' must be a text"),
    *((f'{{"prompt": "x", "completion": "y", "numbers": {numbers}}}', "four positive integers") for numbers in BAD_NUMBERS),
    ('{"prompt": "x", "completion": "y"}', "four positive integers"), (b'{"prompt": "\xe9"}', "utf-8")])
def test_bad_row_is_named_with_file_line_and_reason(monkeypatch, capsys, tmp_path, line, reason):
    path = write(tmp_path / "rows.jsonl", row(4, 4, 4, 4, note="a line separator, \u2028, is no line end"))
    with open(path, "ab") as file:
        file.write((line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(SystemExit, match=reason) as error:
        sft.read_rows(path, ("prompt", "completion"))
    assert str(error.value).startswith(f"{path}:2: ")
    monkeypatch.setattr(sft, "STRICT", 0)
    assert len(sft.read_rows(path, ("prompt", "completion"))) == 1
    assert f"1 rows of {path} are bad and skipped, the first: {path}:2: " in capsys.readouterr().out


def test_rows_that_are_accepted(tmp_path):
    """A BOM, Windows line ends, blank lines, a last line without its end, text with line separators, emoji as an escaped pair."""
    first, second = row(4, 4, 4, 4, id="a", note="\u2028 \u0085 \x0b"), row(3, 3, 8, 8, id="b", note="\U0001f600")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(first, ensure_ascii=False).encode() + b"\r\n\r\n  \n" + json.dumps(second).encode())
    assert sft.read_rows(path, ("prompt", "completion")) == [first, second]


@pytest.mark.parametrize("script, split", [("sft", "train"), ("sft", "val"), ("grpo", "train"), ("grpo", "val"), ("eval", "test"), ("eval", "train")])
def test_bad_and_empty_data_stop_every_script(run, root, script, split):
    path = root / f"data/{split}.jsonl"
    count = len(read(path))
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"prompt": "x", "completion": "y", "numbers": [1, 2, 3]}\n')
    options = {"out": root, "resume": 0, **({"model": "tiny"} if script == "sft" else {})}
    assert f"{path}:{count + 1}: numbers must be a list of four positive integers, not [1, 2, 3]" in refused(run(script, **options))
    path.write_text("", encoding="utf-8")
    assert f"{path} is empty" in refused(run(script, **options))
    assert (root / script / "summary.json").is_file()       # a refused command leaves the finished run as it was


def test_samples_and_prompts_above_the_limit_are_counted_and_left_out(run, root):
    rows = read(root / "data/train.jsonl")
    long = {**rows[0], "id": "long", "prompt": rows[0]["prompt"] + " please" * 300}
    write(root / "data/train.jsonl", *rows, long)
    options = {"out": root, "resume": 0, "steps": 1}
    output = done(run("sft", **options, model="tiny", **SMALL_SFT, max_tokens=250))
    assert f"1 of {len(rows) + 1} samples are longer than MAX_TOKENS=250" in output
    assert f"no sample of {len(rows) + 1} is within MAX_TOKENS=5" in refused(run("sft", **options, model="tiny", max_tokens=5))
    done(run("sft", **options, model="tiny", **SMALL_SFT))
    output = done(run("grpo", **options, **SMALL_GRPO, max_prompt_tokens=20))
    assert f"1 of {len(rows) + 1} prompts are longer than MAX_PROMPT_TOKENS=20" in output
    assert f"no prompt of {len(rows) + 1} is within" in refused(run("grpo", **options, max_prompt_tokens=3))


def test_eval_refuses_hands_that_were_trained_on(run, root):
    rows, train = read(root / "data/test.jsonl"), read(root / "data/train.jsonl")
    numbers = sorted(train[0]["numbers"], reverse=train[0]["numbers"] == sorted(train[0]["numbers"]))
    write(root / "data/test.jsonl", *rows, row(*numbers))
    assert numbers != train[0]["numbers"] or len(set(numbers)) == 1
    output = refused(run("eval", out=root, resume=0))
    assert f"1 of 4 rows of {root}/data/test.jsonl are in train.jsonl too" in output
    hands = write(root / "hands.txt", " ".join(map(str, numbers)))
    assert f"1 of 1 rows of {hands} are in train.jsonl too" in refused(run("eval", out=root, resume=0, hands=hands))
    for script, options in (("sft", {"model": "tiny"}), ("grpo", {})):
        assert f"1 of 4 rows of {root}/data/test.jsonl are in train.jsonl too" in refused(run(script, out=root, resume=0, **options))
    done(run("eval", out=root, resume=0, strict=0, samples=1, bootstrap=10, max_new_tokens=5))
    assert load(root / "eval/metrics.json")["grpo"]["n"] == 3


def test_eval_on_hands_of_a_file(run, root):
    hands = write(root / "hands.txt", "1 1 11 11", "", "10, 10, 4, 4")
    done(run("eval", out=root, hands=hands, samples=1, bootstrap=10, max_new_tokens=5))
    assert load(root / "eval/metrics.json")["grpo"]["prompts"] == 3       # of the test split, as it was
    assert [c["prompt"] for c in read(root / "eval-hands/grpo.jsonl")] == 2 * ["Make 24 from 1 1 11 11", "Make 24 from 10 10 4 4"]
    write(hands, "1 1 11 11", "1 1 x 11")
    assert f"{hands}:2: numbers must be" in refused(run("eval", out=root, resume=0, hands=hands))
    write(hands, "")
    assert f"{hands} holds no row" in refused(run("eval", out=root, resume=0, hands=hands))


# Data


def hands_of(folder):
    return {split: {tuple(sorted(r["numbers"])) for r in read(folder / f"data/{split}.jsonl")} for split in ("train", "val", "test")}


def test_data_of_all_hands(run, tmp_path):
    output = done(run("data_prep", out=tmp_path, traces_per_hand=3))
    assert "1820 hands of 1..13, 1362 can make 24" in output
    hands = hands_of(tmp_path)
    assert {split: len(found) for split, found in hands.items()} == {"train": 954, "val": 136, "test": 272}
    assert len(set().union(*hands.values())) == 1362
    rows = [r for split in hands for r in read(tmp_path / f"data/{split}.jsonl")]
    tokenizer = sft.tiny_tokenizer([r["completion"] for r in rows])
    encoded = tokenizer([r["completion"] for r in rows]).input_ids
    assert max(map(len, encoded)) <= data_prep.MAX_TRACE_TOKENS
    assert tokenizer.batch_decode(encoded, skip_special_tokens=True) == [r["completion"] for r in rows]
    for r in rows:
        assert r["prompt"] == reward.prompt("game24", r) and set(r) == {"id", "prompt", "completion", "numbers"}
        scores = reward.score("game24", r["completion"], r)
        assert (scores["outcome"], scores["process"]) == (1, 1), r
    assert len({r["id"] for r in rows}) == len(rows) == len({r["completion"] for r in rows})
    assert any(r["numbers"] != sorted(r["numbers"]) for r in rows) and len(set(map(len, encoded))) > 20       # random order, many lengths
    summary = load(tmp_path / "data/summary.json")
    assert summary["train"]["rows"] == len(read(tmp_path / "data/train.jsonl")) and summary["solvable"] == 1362


def test_same_seed_same_bytes(run, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        done(run("data_prep", out=tmp_path / name, seed=seed, **SMALL_DATA))
    for split in ("train", "val", "test"):
        a, b, c = ((tmp_path / name / f"data/{split}.jsonl").read_bytes() for name in "abc")
        assert a == b != c


def test_other_target(run, tmp_path):
    done(run("data_prep", out=tmp_path, **{**SMALL_DATA, "TARGET": 10}))
    for r in read(tmp_path / "data/train.jsonl"):
        scores = reward.score("game24", r["completion"], r)
        assert r["prompt"].startswith("Make 10 from") and (scores["outcome"], scores["process"]) == (1, 1)


@pytest.mark.parametrize("lines", [
    ["4 4 4 4", "6 5 3 4", "", "5 6 4 3", "1 1 1 1"], ["rank,a,b,c,d", "1,4,4,4,4", "2,6,5,3,4"], ["\ufeff4,4,4,4", "6, 5, 3, 4"]])
def test_holdout_is_the_test_split(run, tmp_path, lines):
    hands = write(tmp_path / "hands.txt", *lines)
    done(run("data_prep", out=tmp_path, holdout=hands, **{**SMALL_DATA, "HIGHEST": 6}))
    found = hands_of(tmp_path)
    assert found["test"] == {(4, 4, 4, 4), (3, 4, 5, 6)} and not found["test"] & (found["train"] | found["val"])
    solvable = [hand for hand in combinations_with_replacement(range(3, 7), 4) if data_prep.solvable(hand, 24)]
    assert found["test"] | found["train"] | found["val"] == set(solvable)


@pytest.mark.parametrize("line", ["4 5 6", "4 5 6 x", "4 5 6 0", "4 5 6 7 8", "4 5 6 -7", "4,5,6,7.5"])
def test_bad_holdout_line_is_named(run, tmp_path, line):
    hands = write(tmp_path / "hands.txt", "4 4 4 4", line)
    assert f"{hands}:2: four positive integers are expected" in refused(run("data_prep", out=tmp_path, holdout=hands, **SMALL_DATA))
    write(hands, "")
    assert f"{hands}: no hand in it" in refused(run("data_prep", out=tmp_path, holdout=hands, **SMALL_DATA))


@pytest.mark.parametrize("option, reason", [
    ({"LOWEST": 1, "HIGHEST": 1}, "not enough hands"), ({"TEST_HANDS": 2000}, "not enough hands"), ({"LOWEST": 0}, "LOWEST"),
    ({"MAX_TRACE_TOKENS": 20}, "MAX_TRACE_TOKENS")])
def test_impossible_data_is_refused(run, tmp_path, option, reason):
    output = refused(run("data_prep", out=tmp_path, limit=5, **{**SMALL_DATA, **option}))
    assert reason in output.splitlines()[-1]
    assert not (tmp_path / "data/summary.json").exists()


# Prompts and the ends of completions


MESSAGES = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{{ '\n' }}{% endfor %}"


@pytest.mark.parametrize("template, text", [
    (None, "Make 24\n"),
    (MESSAGES + "{% if add_generation_prompt %}<assistant>{{ '\n' }}{% endif %}", "<user> Make 24\n<assistant>\n"),
    (MESSAGES + "{% if add_generation_prompt %}<assistant> <think>{{ '\n' }}{% endif %}", "<user> Make 24\n<assistant> ")])
def test_prompt_is_in_the_chat_template(template, text):
    tokenizer = sft.tiny_tokenizer(["Make 24 <user> <assistant> <think> </think>"])
    tokenizer.chat_template = template
    expected = [tokenizer.convert_tokens_to_ids(word) for word in re.findall(r"\n|\S+", text)]
    assert sft.encode_prompt(tokenizer, "Make 24") == expected and tokenizer.unk_token_id not in expected


@pytest.mark.parametrize("configured, expected", [(None, [7]), (7, [7]), (3, [7, 3]), ([5, 7], [7, 5])])
def test_end_ids(configured, expected):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=configured))
    assert sft.end_ids(model, SimpleNamespace(eos_token_id=7)) == expected


# Other trainers, and what the READMEs promise


def test_trl_trains_with_the_reward(trained, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = PreTrainedTokenizerFast.from_pretrained(trained / "sft")
    rows = [{"prompt": r["prompt"] + "\n", "numbers": r["numbers"]} for r in read(trained / "data/train.jsonl")]
    settings = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=2, per_device_train_batch_size=32, num_generations=8,
                          max_completion_length=TOKENS, temperature=1.2, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True)
    trainer = GRPOTrainer(model=AutoModelForCausalLM.from_pretrained(trained / "sft"), processing_class=tokenizer, args=settings,
                          reward_funcs=reward.game24, train_dataset=Dataset.from_list(rows))
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(log) == 2 and sum(entry["rewards/game24/mean"] for entry in log) > 0
    assert all(0 <= entry["reward"] <= 1 for entry in log) and sum(entry["grad_norm"] for entry in log) > 0


def code_of(text):
    """Lines of code of a markdown text, in blocks and between backticks, without their comments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$|((?:^ {4}.*\n)+)", text, re.MULTILINE | re.DOTALL)
    blocks = [(fenced or indented).replace("\\\n", " ").split("\n") for fenced, indented in blocks]
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    clean = [[line for line in (re.sub(r"(^|\s+)#.*", "", line).strip() for line in block) if line] for block in blocks]
    return clean, inline


def commands_of(text):
    """Words of every make and python command in a markdown text."""
    blocks, inline = code_of(text)
    for line in [line for block in blocks for line in block] + inline:
        for part in re.split(r"&&|;|\|", line):
            part = re.sub(r"^[\s$]*(\w+=\S+ +)*", "", part)
            if re.match(r"(make|\S*python3?) \S", part):
                yield shlex.split(part)


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_readme_commands_exist(name):
    if name == "README.zh.md" and not (ROOT / name).exists():
        assert name not in (ROOT / "README.md").read_text(encoding="utf-8")      # to be written: nothing may point at it before
        return
    commands = list(commands_of((ROOT / name).read_text(encoding="utf-8")))
    assert ["make", "train"] in commands and ["make", "test"] in commands
    targets = {".venv", *re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)}
    for program, *words in commands:
        if program == "make":
            given = [word for word in words if "=" in word]
            assert set(words) - set(given) - {"-n"} <= targets, words
            done(make("-n", "help", *given))      # refuses a name that no script has
        elif words[0].endswith(".py"):
            assert (ROOT / words[0]).is_file(), words
            if options := {word.split("=")[0] for word in words[1:] if word.startswith("--")}:
                assert options <= {f"--{constant.lower()}" for constant in constants_of(Path(words[0]).stem)} | {"--help"}, words


def test_task_of_ones_own_from_the_readme(tmp_path):
    blocks = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    task, data = next(block for block in blocks if "TASKS[" in block), next(block for block in blocks if "pathlib" in block)
    assert task.count("\n") < 30
    for name in ("Makefile", "requirements.txt", *(f"{script}.py" for script in (*SCRIPTS, "reward"))):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parents[1])
    with open(tmp_path / "reward.py", "a", encoding="utf-8") as file:
        file.write("\n\n" + task)
    small = {"SFT_STEPS": 30, "BATCH_TOKENS": 512, "EVAL_ROWS": 4, "STEPS": 1, "PROMPTS_PER_STEP": 2, "GROUP_SIZE": 2, "EVAL_EVERY": 30, "SAMPLES": 1,
             "MAX_NEW_TOKENS": 12, "BOOTSTRAP": 10, "THREADS": 1, "MODEL": "tiny"}
    commands = [[sys.executable, "-c", data], ["make", "-o", ".venv/ready", "sft", "grpo", "eval", "TASK=sort", "DATA=runs/sort/data",
                                               *(f"{name}={value}" for name, value in small.items())]]
    for command in commands:
        result = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert result.returncode == 0, result.stdout
    assert "places" in read(tmp_path / "runs/sort/grpo/log.jsonl")[1]
    assert load(tmp_path / "runs/sort/eval/metrics.json")["grpo"]["n"] == 200


def test_readmes_have_the_same_code():
    readmes = [ROOT / name for name in ("README.md", "README.zh.md") if (ROOT / name).exists()]
    blocks = [code_of(path.read_text(encoding="utf-8"))[0] for path in readmes]
    assert blocks[0] and all(other == blocks[0] for other in blocks)
