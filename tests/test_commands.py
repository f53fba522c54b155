"""The real commands, small, on a CPU: data_prep, sft, grpo and eval of both tasks, and what they say to bad input."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import DATA, ENVIRONMENT, GRPO, ROOT, TRAINED, die, done, killed, load, read, refused, write
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

TRAIN = {**DATA, **TRAINED, **GRPO, "steps": 4, "samples": 2, "bootstrap": 50, "threads": 1}
LORA = {"lora_rank": 4, "load_4bit": 1, "bf16": 0}


def make(*words, **constants) -> SimpleNamespace:
    # the environment of the test is that of the scripts: make must not install another one
    words = ["make", "-o", ".venv", *words, *(f"{name.upper()}={value}" for name, value in constants.items())]
    result = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    return SimpleNamespace(code=result.returncode, output=result.stdout + result.stderr)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small `make train`."""
    root = tmp_path_factory.mktemp("make") / "run"
    output = done(make("train", out=root, **TRAIN))
    (root / "output.txt").write_text(output, encoding="utf-8")
    return root


@pytest.fixture
def root(trained, tmp_path):
    """A copy of the trained run that a test may change."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def pretrained(trained, tmp_path_factory):
    """The SFT policy as if it were somebody else's model: with a chat template, and with two EOS ids as Qwen3 has."""
    folder = tmp_path_factory.mktemp("pretrained")
    for path in trained.glob("sft/*"):
        if path.name in ("config.json", "generation_config.json", "model.safetensors") or "tokenizer" in path.name:
            shutil.copy(path, folder)
    config = load(folder / "config.json")
    assert config.pop("tiny")
    write(folder / "config.json", config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{{ '\n' }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("</think>")]
    write(folder / "generation_config.json", load(folder / "generation_config.json") | {"eos_token_id": ends})
    return folder


def greedy_texts(folder: Path, rows: list[dict], max_new_tokens: int) -> list[str]:
    """Greedy completions by transformers alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = []
    for row in rows:
        prompt = tokenizer(row["prompt"] + "\n", return_tensors="pt")
        ids = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)[0]
        texts.append(tokenizer.decode(ids[prompt["input_ids"].shape[1]:], skip_special_tokens=True))
    return texts


def start_from(script: str, policy: Path | str) -> dict:
    """The constant that makes a script load a policy."""
    return {"sft": {"init_from": policy}, "grpo": {"sft": policy}, "eval": {"policies": f"mine={policy}"}}[script]


def greedy(path: Path) -> list[str]:
    return [row["completion"] for row in read(path) if row["sample"] == 0]


# ---- make train -----------------------------------------------------------------------------------------------------


def test_train_writes_logs_samples_and_a_report(trained):
    assert not list(trained.rglob("*.tmp"))
    log = read(trained / "sft/log.jsonl")
    assert [entry["step"] for entry in log] == list(range(1, 101)) and log[-1]["loss"] < 0.7 * log[0]["loss"]
    start, *log = read(trained / "grpo/log.jsonl")
    assert start["step"] == 0 and "val_accuracy" in start and [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert log[0]["kl"] == 0 and log[-1]["kl"] > 0 and all(entry["reward"] > 0 for entry in log)
    samples = read(trained / "grpo/samples.jsonl")
    assert len(samples) == 3 * GRPO["prompts_per_step"] and {"prompt", "completion", "advantage"} <= samples[0].keys()
    events = EventAccumulator(str(trained / "grpo/tensorboard")).Reload()
    rewards = [event.value for event in events.Scalars("reward")]
    assert rewards == pytest.approx([entry["reward"] for entry in log], rel=1e-5)
    report = (trained / "eval/report.md").read_text(encoding="utf-8")
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", report)
    assert sorted(images) == sorted(path.name for path in trained.glob("eval/*.png")) and len(images) == 3
    for name in images:
        low, high = Image.open(trained / "eval" / name).convert("L").getextrema()
        assert high - low > 100
    table = re.findall(r"^\| (?:sft|grpo) \|.*$", report, re.MULTILINE)
    assert len(table) == 2 and "\n".join(table) in (trained / "output.txt").read_text(encoding="utf-8")


def test_metrics_are_those_of_the_completions(trained):
    metrics = load(trained / "eval/metrics.json")
    assert list(metrics) == ["sft", "grpo"]
    for name, values in metrics.items():
        completions = read(trained / f"eval/{name}.jsonl")
        prompts = [row["prompt"] for row in read(trained / "data/test.jsonl")]
        assert [row["prompt"] for row in completions] == 3 * prompts
        sampled = [row for row in completions if row["sample"]]
        means = {key: sum(row[key] for row in sampled) / len(sampled)
                 for key in ("correct", "answered", "tokens", "process")}
        expected = {"n": len(sampled), "accuracy": means["correct"], "unfinished": 1 - means["answered"],
                    "mean_tokens": means["tokens"], "process": means["process"],
                    "wrong": means["answered"] - means["correct"]}
        assert {key: values[key] for key in expected} == pytest.approx(expected)
        assert values["accuracy_ci"][0] <= values["accuracy"] <= values["accuracy_ci"][1]


@pytest.mark.parametrize("script, folder", [("data_prep", "data"), ("sft", "sft"), ("grpo", "grpo"), ("eval", "eval")])
def test_finished_stage_is_complete(run, trained, script, folder):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    assert f"{trained / folder} is complete" in done(run(script, out=trained, **TRAIN))
    assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("*")}


def test_killed_evaluation_keeps_the_finished_policy(run, root, trained):
    shutil.rmtree(root / "eval")
    killed(run("eval", before=die("os.replace", "'grpo.jsonl' in str(args)"), **{**TRAIN, "out": root}))
    finished = (root / "eval/sft.jsonl").stat().st_mtime_ns
    done(run("eval", **{**TRAIN, "out": root}))
    assert (root / "eval/sft.jsonl").stat().st_mtime_ns == finished
    assert load(root / "eval/metrics.json") == load(trained / "eval/metrics.json")


def test_plots_ask_and_export(run, root, trained):
    settings = {"out": root, **TRAIN}
    (root / "eval/accuracy.png").unlink()
    done(run("eval", **settings, plots_only=1))
    assert (root / "eval/accuracy.png").stat().st_size > 5000
    output = done(run("eval", **settings, q="5 3 4 4"))
    for name in ("sft", "grpo"):
        assert re.search(rf"=== {name}: Make 24 from 5 3 4 4\n.+--- {name}: (right|wrong|unfinished), \d+ tokens",
                         output, re.DOTALL)
    assert "four positive integers" in refused(run("eval", **settings, q="5 3 4"))
    done(run("eval", **settings, export=root / "export"))
    expected = greedy(trained / "eval/grpo.jsonl")
    assert greedy_texts(root / "export", read(trained / "data/test.jsonl"), TRAIN["max_new_tokens"]) == expected


def test_eval_of_hands_from_a_file(run, root):
    first, second, _ = read(root / "data/test.jsonl")
    hands = write(root / "hands.txt", " ".join(map(str, first["numbers"])), "", ", ".join(map(str, second["numbers"])))
    settings = {**TRAIN, "out": root, "hands": hands, "max_new_tokens": 5}
    done(run("eval", **settings))
    made = [row["numbers"] for row in read(root / "eval-hands/grpo.jsonl")]
    assert made == 3 * [sorted(first["numbers"]), sorted(second["numbers"])]
    write(hands, "3 3 4 5", "3 3 x 5")
    assert f"{hands}:2: four positive integers" in refused(run("eval", **settings))


def planned(*words, **constants) -> list[list[str]]:
    """Words of each command that make would run."""
    lines = done(make("-n", *words, **constants)).splitlines()
    return [shlex.split(line)[1:] for line in lines if ".py" in line]


def test_make_passes_every_constant_to_every_script(tmp_path):
    for words in planned("train", out=tmp_path, beta=0, sft_lr=0.5):
        assert {"OUT=$OUT", "BETA=$BETA", "SFT_LR=$SFT_LR"} <= set(words)       # make exports them
    assert [words[0] for words in planned("train")] == ["data_prep.py", "sft.py", "grpo.py", "eval.py"]
    assert [words[0] for words in planned("grpo", "eval", sft="x", data="y")] == ["grpo.py", "eval.py"]
    first, second, third = planned("sft", task="lyrics", out="x")
    assert first[-3:] == ["OUT=x/raw", "DATA=x/data/raw", "VOCABULARY=x/data/train.jsonl"]
    assert second[-3:] == ["OUT=x/keywords", "DATA=x/data/keywords", "INIT_FROM=x/raw/sft"]
    assert third[-1] == "INIT_FROM=x/keywords/sft" and {"TASK=$TASK", "OUT=$OUT"} <= set(third)
    result = make("data", betta=0)
    assert result.code and "no script has a constant BETTA" in result.output and "BETA" in result.output


# ---- lyrics, pretrained models, tasks of other people ---------------------------------------------------------------


def test_lyrics_in_three_stages(run, tmp_path):
    settings = {**TRAIN, "task": "lyrics", "out": tmp_path, "steps": 1, "max_new_tokens": 40, "max_epochs": 0}
    settings |= {"sft_steps": 6, "sft_eval_every": 6, "batch_tokens": 2048}
    raw = write(tmp_path / "raw.jsonl", *(ROOT / "assets/verses.jsonl").read_text(encoding="utf-8").split("\n")[:150])
    done(run("data_prep", **settings, raw=raw, variants=2, val_texts=6, test_texts=6))
    data, train = tmp_path / "data", tmp_path / "data/train.jsonl"
    done(run("sft", **settings | {"out": tmp_path / "raw", "data": data / "raw", "vocabulary": train}))
    second = {"out": tmp_path / "keywords", "data": data / "keywords", "init_from": tmp_path / "raw/sft"}
    done(run("sft", **settings | second))
    done(run("sft", **settings, init_from=tmp_path / "keywords/sft"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sft")
    for row in read(train):         # the first stage knew the words of the last one
        ids = tokenizer(row["completion"]).input_ids
        assert tokenizer.unk_token_id not in ids
    done(run("grpo", **settings))
    entry = read(tmp_path / "grpo/log.jsonl")[1]
    assert {"parts/coverage", "parts/rhyme", "parts/fluency"} <= entry.keys()
    done(run("eval", **settings))
    metrics = load(tmp_path / "eval/metrics.json")
    assert list(metrics) == ["raw", "sft", "grpo", "human"] and metrics["human"]["reward"] > metrics["grpo"]["reward"]
    assert "| human |" in (tmp_path / "eval/report.md").read_text(encoding="utf-8")


def test_lora_on_a_pretrained_model_in_4_bits(run, trained, pretrained, tmp_path):
    settings = {**TRAIN, **LORA, "model": pretrained, "out": tmp_path, "data": trained / "data", "steps": 2}
    settings |= {"lr": 0.003, "max_new_tokens": 20}
    done(run("sft", **{**settings, "sft_steps": 5, "sft_eval_every": 5, "sft_lr": 0.002}))
    done(run("grpo", **settings))
    done(run("eval", **settings))
    done(run("eval", **settings, export=tmp_path / "export"))
    for stage in ("sft", "grpo"):
        config = load(tmp_path / stage / "adapter_config.json")
        assert (config["r"], config["base_model_name_or_path"]) == (4, str(pretrained))
        assert not (tmp_path / stage / "model.safetensors").exists()
    _, first, second = read(tmp_path / "grpo/log.jsonl")
    # the reference is the SFT adapter, not the base, and the 4-bit weights are the same in rollout and update
    assert first["kl"] == 0 and first["ratio_error"] < 1e-4 and first["grad_norm"] > 0 and second["kl"] > 0
    completions = [row for name in ("sft", "grpo") for row in read(tmp_path / f"eval/{name}.jsonl")]
    assert all(row["completion"].endswith("</think>") for row in completions if "</think>" in row["completion"])
    assert "quantization_config" not in load(tmp_path / "export/config.json")
    rows, expected = read(trained / "data/test.jsonl"), greedy(tmp_path / "eval/grpo.jsonl")
    assert greedy_texts(tmp_path / "export", rows, 20) == expected != greedy_texts(pretrained, rows, 20)


REWARD = '''

def sort_prompt(row):
    if not row.get("words"):
        raise ValueError("words must be given")
    return row["prompt"]


def score_sort(completion, row, truncated):
    right = sum(a == b for a, b in zip(completion.split(), sorted(row["words"]))) / len(row["words"])
    return {"reward": right, "correct": float(right == 1), "answered": float(not truncated)}


TASKS["sort"] = (sort_prompt, score_sort)
'''


def test_copied_script_runs_with_other_data_reward_and_model(run, pretrained, tmp_path):
    shutil.copy(ROOT / "grpo.py", tmp_path)
    source = (ROOT / "reward.py").read_text(encoding="utf-8")
    (tmp_path / "reward.py").write_text(source + REWARD, encoding="utf-8")
    rows = [{"prompt": f"Sort {a} {b}", "words": [a, b]} for a in "987" for b in "345"]
    write(tmp_path / "mine/train.jsonl", *rows[:6])
    write(tmp_path / "mine/val.jsonl", *rows[6:])
    settings = {**GRPO, "task": "sort", "data": "mine", "sft": pretrained, "model": pretrained, **LORA, "steps": 1}
    done(run(tmp_path / "grpo.py", cwd=tmp_path, **settings | {"max_new_tokens": 12}))
    assert read(tmp_path / "runs/sort/grpo/log.jsonl")[1]["reward"] >= 0
    assert (tmp_path / "runs/sort/grpo/adapter_model.safetensors").is_file()
    write(tmp_path / "mine/train.jsonl", *rows[:6], {"prompt": "Sort", "words": []})
    assert "mine/train.jsonl:7: words must be given" in refused(run(tmp_path / "grpo.py", cwd=tmp_path, **settings))


# ---- bad input ------------------------------------------------------------------------------------------------------


CASES = [("sft", "train"), ("sft", "val"), ("grpo", "train"), ("grpo", "val"), ("eval", "test"), ("eval", "train")]


@pytest.mark.parametrize("script, split", CASES)
def test_bad_missing_and_overlapping_data_are_named(run, root, script, split):
    path = root / f"data/{split}.jsonl"
    rows, settings = read(path), {**TRAIN, "out": root, "seed": 1}
    write(path, *rows, {**rows[0], "numbers": [1, 2, 3]})
    reason = "numbers must be a list of four positive integers, not [1, 2, 3]"
    assert f"{path}:{len(rows) + 1}: {reason}" in refused(run(script, **settings))
    write(path, *rows, '{"prompt": "x", ')
    assert f"{path}:{len(rows) + 1}: " in refused(run(script, **settings))
    if (script, split) != ("eval", "train"):        # which may evaluate on data alone
        path.unlink()
        output = refused(run(script, **settings))
        assert str(path) in output and "make data" in output
    other = "train" if split != "train" else "test" if script == "eval" else "val"
    write(path, *rows, read(root / f"data/{other}.jsonl")[0])
    assert "such as 'Make 24 from" in refused(run(script, **settings))
    assert (root / script / "summary.json").is_file() and not (root / f"{script}.1").exists()


@pytest.mark.parametrize("script", ["sft", "grpo", "eval"])
@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B-that-is-not-there", "runs/game24/stf"])
def test_model_out_of_reach_is_explained(run, trained, tmp_path, script, name):
    output = refused(run(script, **TRAIN, **start_from(script, name), out=tmp_path, data=trained / "data"))
    assert name in output and ("needs no download" in output or "make train" in output)
    assert not (tmp_path / script).exists()


@pytest.mark.parametrize("script", ["sft", "grpo", "eval"])
def test_policy_of_another_kind_of_model_is_refused(run, trained, pretrained, tmp_path, script):
    settings = {**TRAIN, "out": tmp_path, "data": trained / "data", **LORA}
    for model, policy in (("some/model", trained / "sft"), ("tiny", pretrained)):
        output = refused(run(script, **settings | start_from(script, policy) | {"model": model}))
        assert f"MODEL={model}" in output and str(policy) in output


@pytest.mark.parametrize("script", ["sft", "grpo", "eval"])
def test_pickled_weights_are_not_read(run, trained, pretrained, tmp_path, script):
    class Touch:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was-run"),)

    folder = shutil.copytree(pretrained, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Touch()}, folder / "pytorch_model.bin")
    settings = {**TRAIN, "out": tmp_path, "data": trained / "data", "model": folder, "lora_rank": 0}
    result = run(script, **settings | start_from(script, folder))
    assert result.code == 1 and "model.safetensors" in result.output and not (tmp_path / "was-run").exists()
    assert script == "eval" or "cannot load" in refused(result)
