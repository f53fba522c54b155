"""A run that is killed or damaged goes on and ends bit for bit as if nothing had happened; another run is never lost.

The faults are real ones: SIGKILL at chosen calls, and files that are changed on the disk.
"""

import fcntl
import functools
import os
import shutil
from pathlib import Path

import pytest
import torch
from commands import DATA, GRPO, SFT, TRAINED, die, done, killed, load, read, refused, wrap, write
from safetensors.torch import load_file

import grpo
import sft

# A smaller rank has a 32-bit optimizer state. The rollout in 4 bits is slow on a CPU
LORA = {"lora_rank": 32, "load_4bit": 1, "prompts_per_step": 2, "max_new_tokens": 30, "reference_every": 3}

RUN_BEGINS = die("os.replace", "True")
STEP = die("torch.Tensor.backward", "len(calls) == 5")
HALF_A_CHECKPOINT = die("torch.save", "'step-' in args[1].name", "args[1].write(b'PK half'), args[1].flush()")
BETWEEN_BEST_AND_CHECKPOINT = die("os.replace", "len(calls) > 1 and 'best.pt' in str(calls[-2])")
TWO_CHECKPOINTS_AND_A_NEW_ONE = die("os.unlink", "'step-' in str(args)")
HALF_A_POLICY = die("transformers.PreTrainedTokenizerFast.save_pretrained", "True")
NO_SUMMARY = die("os.replace", "'summary' in str(args)")


@pytest.fixture(scope="module")
def base(run, tmp_path_factory):
    """Data, a tiny policy that earns some rewards, and an adapter on it in NF4."""
    root = tmp_path_factory.mktemp("base")
    done(run("data_prep", out=root, **DATA))
    done(run("sft", out=root, **TRAINED))
    done(run("sft", out=root / "lora", **options(root, "sft", "lora")))
    return root


def options(base: Path, script: str, weights: str) -> dict:
    lora = LORA if weights == "lora" else {}
    if script == "grpo":
        return {"data": base / "data", "sft": base / ("lora/sft" if lora else "sft"), **GRPO, **lora}
    return {"data": base / "data", **SFT, **lora, **({"init_from": base / "sft"} if lora else {})}


@pytest.fixture(scope="module")
def undisturbed(run, base, tmp_path_factory):
    """A function that gives the folder of a case's run that nothing disturbed."""
    @functools.cache
    def get(script: str, weights: str) -> Path:
        root = tmp_path_factory.mktemp(f"{script}-{weights}")
        done(run(script, out=root, **options(base, script, weights)))
        return root / script
    return get


def same(a, b, where="") -> None:
    """Holds that two values are equal: tensors bit for bit, dicts apart from times."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), where
    elif isinstance(a, (list, tuple)):
        same(dict(enumerate(a)), dict(enumerate(b)), where)
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if not str(key).endswith(("seconds", "_per_s")):
                same(a[key], b[key], f"{where}/{key}")
    else:
        assert a == b, where


def same_runs(a: Path, b: Path) -> None:
    """Holds that two finished runs are equal: weights, optimizer, logs, samples and summary."""
    readers = {".safetensors": load_file, ".pt": lambda path: torch.load(path, weights_only=True), ".jsonl": read}
    assert sorted(path.name for path in a.iterdir()) == sorted(path.name for path in b.iterdir())
    for path in [*a.glob("*.safetensors"), *a.glob("*.pt"), *a.glob("*.jsonl")]:
        same(readers[path.suffix](path), readers[path.suffix](b / path.name), path.name)
    same(load(a / "summary.json"), load(b / "summary.json"))


@pytest.mark.parametrize("script, weights", [("sft", "fp32"), ("sft", "lora"), ("grpo", "fp32"), ("grpo", "lora")])
def test_killed_at_every_stage_ends_bit_for_bit_as_undisturbed(run, base, undisturbed, tmp_path, script, weights):
    # a second best is sure only if SFT begins with an untrained model
    again = [BETWEEN_BEST_AND_CHECKPOINT] if (script, weights) == ("sft", "fp32") else []
    for kill in (RUN_BEGINS, BETWEEN_BEST_AND_CHECKPOINT, STEP, TWO_CHECKPOINTS_AND_A_NEW_ONE, HALF_A_CHECKPOINT,
                 *again, HALF_A_POLICY, NO_SUMMARY):
        killed(run(script, out=tmp_path, before=kill, **options(base, script, weights)))
        if (tmp_path / script / "log.jsonl").exists():
            with open(tmp_path / script / "log.jsonl", "a") as file:
                file.write('{"step": 1, "lo')        # what a kill may leave of a line
    assert "resuming" in done(run(script, out=tmp_path, **options(base, script, weights)))
    same_runs(tmp_path / script, undisturbed(script, weights))
    checkpoint = torch.load(max((tmp_path / script).glob("step-*.pt")), weights_only=True)
    assert ("torch.uint8" in str(checkpoint["optimizers"])) == (weights == "lora")


@pytest.fixture
def finished(undisturbed, tmp_path):
    """A copy of the GRPO run."""
    return shutil.copytree(undisturbed("grpo", "fp32"), tmp_path / "grpo")


@pytest.fixture
def cut(finished):
    """A copy of the GRPO run, as if it had been killed before its policy was written."""
    (finished / "summary.json").unlink()
    (finished / "model.safetensors").unlink()
    return finished


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("damage, count", [(flip, 1), (halve, 1), (empty, 1), (flip, 2)])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(run, base, undisturbed, cut, damage, count):
    newest = sorted(cut.glob("step-*.pt"), reverse=True)
    assert len(newest) == 2
    for path in newest[:count]:
        damage(path)
    output = done(run("grpo", out=cut.parent, **options(base, "grpo", "fp32")))
    assert all(f"{path} is missing or damaged" in output for path in newest[:count])
    assert ("after step 7" in output) == (count == 1)
    same_runs(cut, undisturbed("grpo", "fp32"))


def test_damaged_best_weights_stop_with_a_message(run, base, cut):
    flip(cut / "best.pt")
    output = refused(run("grpo", out=cut.parent, **options(base, "grpo", "fp32")))
    assert f"{cut}/best.pt is missing or damaged" in output


@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_constants_that_change_no_result_leave_a_finished_run_complete(run, base, undisturbed, tmp_path, script):
    folder = shutil.copytree(undisturbed(script, "fp32"), tmp_path / script)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    moved = {name: shutil.copytree(base / name, tmp_path / f"moved/{name}") for name in ("data", "sft")}
    free = {"sft": sft, "grpo": grpo}[script].free & load(folder / "run.json")["constants"].keys()
    changed = {**options(base, script, "fp32"), **{name.lower(): 7 for name in free},
               "out": tmp_path, "data": moved["data"], "vocabulary": "", "sft": moved["sft"]}
    assert f"{folder} is complete" in done(run(script, **changed))
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("changed, difference", [
    ({"lr": 0.003}, "LR was 0.0002, is 0.003"),
    ({"well_formed": 0.25}, "WELL_FORMED was 0.35, is 0.25"), ("data", "train.jsonl was"), ("sft", "weights was")])
def test_another_run_is_begun_and_the_old_one_kept(run, base, finished, changed, difference):
    link = finished.parent / "here/grpo"        # the folder of a run may be a link to another disk
    link.parent.mkdir()
    link.symlink_to(finished)

    def start(kill=RUN_BEGINS, **settings):
        return run("grpo", out=link.parent, before=kill, **options(base, "grpo", "fp32") | settings).output

    if changed == "data":
        changed = {"data": shutil.copytree(base / "data", finished.parent / "data")}
        write(changed["data"] / "train.jsonl", *read(base / "data/train.jsonl")[1:])
    elif changed == "sft":
        changed = {"sft": shutil.copytree(base / "sft", finished.parent / "sft")}
        flip(changed["sft"] / "model.safetensors")
    before = {path.relative_to(finished): path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    output, kept = start(HALF_A_CHECKPOINT, **changed), finished.with_name("grpo.1")
    assert f"moved to {kept}" in output and difference in output and link.is_symlink()
    assert before == {path.relative_to(kept): path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    assert read(finished / "log.jsonl")[0]["step"] == 0 and "resuming" not in output
    assert "moved to" not in start(**changed) and "grpo.2" in start()


def test_a_folder_in_use_and_an_unfinished_policy_are_refused(run, base, tmp_path):
    settings = {**options(base, "grpo", "fp32"), "out": tmp_path}
    with open(tmp_path / ".grpo.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert f"{tmp_path / 'grpo'} is in use by another process" in refused(run("grpo", **settings))
    policy = shutil.copytree(base / "sft", tmp_path / "sft")
    (policy / "summary.json").unlink()
    output = refused(run("grpo", **settings | {"sft": policy}))
    assert f"{policy} is not finished" in output and "make sft" in output and not (tmp_path / "grpo").exists()


def test_evaluations_without_a_better_policy_end_the_run(run, base, tmp_path):
    constant = "import reward; reward.score = lambda *_: {'reward': 0.5, 'correct': 0.0, 'answered': 1.0}"
    settings = options(base, "grpo", "fp32") | {"steps": 9, "eval_every": 1, "patience": 2}
    output = done(run("grpo", out=tmp_path, before=constant, **settings))
    assert "no better policy in 2 evaluations" in output
    assert load(tmp_path / "grpo/summary.json")["steps"] == 2


@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_update_that_is_not_finite_is_skipped_and_counted(run, base, tmp_path, script):
    spoil = "if len(calls) in (2, 3): args[0][0].grad.view(-1)[0] = float('nan')"
    done(run(script, out=tmp_path, before=wrap("torch.nn.utils.clip_grad_norm_", spoil),
             **options(base, script, "fp32") | {"save_every": 1, "sft_steps": 4, "steps": 4}))
    log = {entry["step"]: entry for entry in read(tmp_path / script / "log.jsonl")}
    assert [log[step]["skipped"] for step in range(1, 5)] == [0, 1, 2, 2]
    assert load(tmp_path / script / "summary.json")["skipped"] == 2
    before, after = (torch.load(tmp_path / script / f"step-00000{step}.pt", weights_only=True) for step in (3, 4))
    assert any(not torch.equal(a, b) for a, b in zip(before["weights"], after["weights"]))
    assert all(weight.isfinite().all() for weight in after["weights"])
