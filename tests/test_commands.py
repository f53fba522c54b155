"""The real commands, small, on a CPU: data_prep, sft, grpo and eval of both tasks, and what they say to bad input."""

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import DATA, ENVIRONMENT, GRPO, ROOT, TRAINED, die, done, killed, load, read, refused, write
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

import reward

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
    root = tmp_path_factory.mktemp("make") / "a run"
    output = done(make("train", out=root, **TRAIN))
    (root / "output.txt").write_text(output, encoding="utf-8")
    return root


@pytest.fixture
def root(trained, tmp_path):
    """A copy of the trained run that a test may change."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def pretrained(trained, tmp_path_factory):
    """The SFT policy as if it were somebody else's model."""
    folder = tmp_path_factory.mktemp("pretrained")
    AutoTokenizer.from_pretrained(trained / "sft").save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(trained / "sft")
    del model.config.tiny
    model.save_pretrained(folder)
    return folder


def start_from(script: str, policy: Path | str) -> dict:
    """The constant that makes a script load a policy."""
    return {"sft": {"init_from": policy}, "grpo": {"sft": policy}, "eval": {"policies": f"mine={policy}"}}[script]


def test_train_writes_logs_samples_and_a_report(trained):
    assert not list(trained.rglob("*.tmp"))
    log = read(trained / "sft/log.jsonl")
    assert [entry["step"] for entry in log] == list(range(1, 101)) and log[-1]["loss"] < 0.7 * log[0]["loss"]
    start, *log = read(trained / "grpo/log.jsonl")
    assert start["step"] == 0 and "val_accuracy" in start and [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert log[0]["kl"] == 0 and log[-1]["kl"] > 0 and any(entry["reward"] > 0 for entry in log)
    samples = read(trained / "grpo/samples.jsonl")
    assert len(samples) == 3 * GRPO["prompts_per_step"] and {"prompt", "completion", "advantage"} <= samples[0].keys()
    events = EventAccumulator(str(trained / "grpo/tensorboard")).Reload()
    rewards = [event.value for event in events.Scalars("reward")]
    assert rewards == pytest.approx([entry["reward"] for entry in log], rel=1e-5)
    report = (trained / "eval/report.md").read_text(encoding="utf-8")
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", report)
    assert sorted(images) == sorted(path.name for path in trained.glob("eval/*.png")) and len(images) == 3
    for name, values in load(trained / "eval/metrics.json").items():
        correct = [row["correct"] for row in read(trained / f"eval/{name}.jsonl") if row["sample"]]
        assert len(correct) == 2 * 3 and values["accuracy"] == pytest.approx(sum(correct) / 6)
    table = re.findall(r"^\| (?:sft|grpo) \|.*$", report, re.MULTILINE)
    assert len(table) == 2 and "\n".join(table) in (trained / "output.txt").read_text(encoding="utf-8")


def test_killed_evaluation_keeps_the_finished_policy(run, root, trained):
    shutil.rmtree(root / "eval")
    killed(run("eval", before=die("os.replace", "'grpo.jsonl' in str(args)"), **{**TRAIN, "out": root}))
    finished = (root / "eval/sft.jsonl").stat().st_mtime_ns
    done(run("eval", **{**TRAIN, "out": root}))
    assert (root / "eval/sft.jsonl").stat().st_mtime_ns == finished
    assert load(root / "eval/metrics.json") == load(trained / "eval/metrics.json")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    for script, folder in (("data_prep", "data"), ("eval", "eval")):
        assert f"{root / folder} is complete" in done(run(script, **{**TRAIN, "out": root}))
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_plots_and_questions(run, root):
    settings = {"out": root, **TRAIN}
    (root / "eval/accuracy.png").unlink()
    with open(root / "grpo/log.jsonl", "a") as file:
        file.write('{"step": 5, "acc')        # a run under way
    done(run("eval", **settings, plots_only=1))
    assert (root / "eval/accuracy.png").stat().st_size > 5000
    output = done(run("eval", **settings, q="5 3 4 4"))
    for name in ("sft", "grpo"):
        assert re.search(rf"=== {name}: Make 24 from 5 3 4 4\n.+--- {name}: (right|wrong|unfinished), \d+ tokens",
                         output, re.DOTALL)
    assert "four positive integers" in refused(run("eval", **settings, q="5 3 4"))


def test_eval_of_hands_from_a_file(run, root):
    first, second, _ = read(root / "data/test.jsonl")
    hands = write(root / "hands.txt", " ".join(map(str, first["numbers"])), "", ", ".join(map(str, second["numbers"])),
                  "1 1 1 1")
    settings = {**TRAIN, "out": root, "hands": hands, "max_new_tokens": 5}
    assert "2 of 3 hands can make 24" in done(run("eval", **settings))
    made = [(row["id"], row["numbers"]) for row in read(root / "eval-hands/grpo.jsonl")]
    assert made == 3 * [(0, sorted(first["numbers"])), (1, sorted(second["numbers"]))]
    write(hands, "3 3 4 5", "3 3 x 5")
    assert f"{hands}:2: four positive integers" in refused(run("eval", **settings))
    trained_on = read(root / "data/train.jsonl")[0]["numbers"]
    write(hands, "3 3 8 8", " ".join(map(str, trained_on)))
    assert "1 of 2 rows" in refused(run("eval", **settings))


def test_distilling_keeps_short_right_answers(run, root):
    settings = {**TRAIN, "out": root, "distil": 12, "distil_keep": 2}
    done(run("eval", **settings, policies=f"sft={root / 'sft'}"))
    rows, summary = read(root / "distil/data/train.jsonl"), load(root / "distil/data/summary.json")
    prompts = {row["prompt"] for row in read(root / "data/train.jsonl")}
    assert summary["prompts"] == len(prompts) and summary["completions"] == 12 * len(prompts)
    assert 0 < len(rows) == summary["kept"] <= summary["right"] < summary["completions"]
    assert all(reward.score("game24", row["completion"], row)["correct"] for row in rows)
    for prompt in {row["prompt"] for row in rows}:
        lengths = [row["tokens"] for row in rows if row["prompt"] == prompt]
        texts = {row["completion"] for row in rows if row["prompt"] == prompt}
        assert len(texts) == len(lengths) <= 2 and lengths == sorted(lengths) and prompt in prompts
    assert read(root / "distil/data/test.jsonl") == read(root / "data/test.jsonl")
    short = {**settings, "sft_steps": 2, "sft_eval_every": 2, "policies": f"sft={root / 'sft'}"}
    done(make("distil", **short))        # the first half is complete
    inputs = load(root / "distil/sft/run.json")["inputs"]
    assert inputs["train.jsonl"] == hashlib.sha256((root / "distil/data/train.jsonl").read_bytes()).hexdigest()
    done(run("eval", **settings, policies=f"sft={root / 'sft'}", distil_prompts=3))
    assert load(root / "distil/data/summary.json")["completions"] == 3 * 12
    assert {row["prompt"] for row in read(root / "distil/data/train.jsonl")} <= prompts


def test_make_skips_stages_whose_results_are_given_and_refuses_unknown_constants():
    plan = done(make("-n", "train", sft="x", data="y"))
    assert "grpo.py" in plan and "eval.py" in plan and "sft.py" not in plan and "data_prep.py" not in plan
    result = make("data", betta=0)
    assert result.code and "no script has a constant BETTA" in result.output and "BETA" in result.output


def test_lyrics_in_three_stages(tmp_path):
    settings = {**TRAIN, "steps": 1, "max_new_tokens": 40, "max_epochs": 0, "sft_steps": 6, "sft_eval_every": 6,
                "batch_tokens": 2048, "variants": 2, "val_texts": 6, "test_texts": 6}
    raw = write(tmp_path / "raw.jsonl", *(ROOT / "assets/verses.jsonl").read_text(encoding="utf-8").split("\n")[:150])
    done(make("train", task="lyrics", out=tmp_path, raw=raw, **settings))
    stages = [load(tmp_path / stage / "sft/run.json")["constants"] for stage in ("raw", "keywords", "")]
    assert [stage["DATA"] for stage in stages] == [f"{tmp_path}/data{end}" for end in ("/raw", "/keywords", "")]
    assert [stage["INIT_FROM"] for stage in stages] == ["tiny", f"{tmp_path}/raw/sft", f"{tmp_path}/keywords/sft"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sft")
    for row in read(tmp_path / "data/train.jsonl"):         # the first stage knew the words of the last one
        assert tokenizer.unk_token_id not in tokenizer(row["completion"]).input_ids
    assert {"parts/coverage", "parts/rhyme", "parts/fluency"} <= read(tmp_path / "grpo/log.jsonl")[1].keys()
    metrics = load(tmp_path / "eval/metrics.json")
    assert list(metrics) == ["raw", "sft", "grpo", "human"] and metrics["human"]["reward"] > metrics["grpo"]["reward"]
    assert "| human |" in (tmp_path / "eval/report.md").read_text(encoding="utf-8")


def test_adapter_on_a_pretrained_model_in_4_bits_is_evaluated(run, trained, pretrained, tmp_path):
    settings = {**TRAIN, **LORA, "model": pretrained, "out": tmp_path, "data": trained / "data", "max_new_tokens": 12}
    done(run("sft", **{**settings, "sft_steps": 5, "sft_eval_every": 5, "sft_lr": 0.002}))
    assert load(tmp_path / "sft/adapter_config.json")["base_model_name_or_path"] == str(pretrained)
    done(run("eval", **settings, policies=f"base={pretrained},sft={tmp_path / 'sft'}"))
    base, adapted = ([row["completion"] for row in read(tmp_path / f"eval/{name}.jsonl")] for name in ("base", "sft"))
    assert base != adapted and not (tmp_path / "sft/model.safetensors").exists()


@pytest.mark.parametrize("script, split", [
    ("sft", "train"), ("sft", "val"), ("grpo", "train"), ("grpo", "val"), ("eval", "test"), ("eval", "train")])
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
def test_a_policy_that_cannot_be_used_is_explained_and_pickled_code_not_run(run, trained, pretrained, tmp_path, script):
    class Touch:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was-run"),)

    settings = {**TRAIN, "out": tmp_path, "data": trained / "data"}
    for name in ("Qwen/Qwen2.5-0.5B-that-is-not-there", "runs/game24/stf"):
        output = refused(run(script, **settings | start_from(script, name)))
        assert name in output and ("needs no download" in output or "make train" in output)
    for model, policy in (("some/model", trained / "sft"), ("tiny", pretrained)):
        output = refused(run(script, **settings | LORA | start_from(script, policy) | {"model": model}))
        assert f"MODEL={model}" in output and str(policy) in output
    folder = shutil.copytree(pretrained, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Touch()}, folder / "pytorch_model.bin")
    result = run(script, **settings | start_from(script, folder) | {"model": folder, "lora_rank": 0})
    assert result.code == 1 and "model.safetensors" in result.output and not (tmp_path / "was-run").exists()
    assert script == "eval" or "cannot load" in refused(result)
    assert not (tmp_path / script).exists()


def test_a_learned_reward_trains_the_policy_and_the_rule_the_classifier(run, trained, tmp_path):
    settings = {**GRPO, "sft": trained / "sft", "data": trained / "data", "steps": 3}
    rewards = []
    for update_every in (0, 2):
        output = done(run(ROOT / "tests/learned_reward.py", update_every, out=tmp_path / f"{update_every}", **settings))
        assert 0 <= float(output.partition("ranking accuracy on unseen hands: ")[2].split()[0]) <= 1
        log = read(tmp_path / f"{update_every}/grpo/log.jsonl")[1:]
        for entry in log:
            assert 0 < entry["reward"] < 1 and entry["reward"] != entry["parts/rule"] and entry["grad_norm"] > 0
        rewards.append([entry["reward"] for entry in log])
    # the same until the classifier has learned from two steps, at the end of the second one
    assert rewards[0][:2] == rewards[1][:2] and rewards[0][2] != rewards[1][2]
