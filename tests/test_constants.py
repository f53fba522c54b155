"""Constants: what is edited in the source, given as NAME=value or by make is what runs, in every mode.

And the blocks that the scripts repeat on purpose, so that each script can be copied alone, are equal.
"""

import ast
import itertools
import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
from commands import DATA, ROOT, SFT, done, load, refused, write

SCRIPTS = ("data_prep", "sft", "grpo", "eval")


def assignments(path: Path) -> dict[str, ast.expr]:
    """The expressions of the constants of a script or of reward.py, which come before its first function."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    top = itertools.takewhile(lambda node: not isinstance(node, ast.FunctionDef), body)
    found = {node.targets[0].id: node.value for node in top if isinstance(node, ast.Assign)}
    return {name: value for name, value in found.items() if name.isupper()}


@pytest.fixture
def copies(tmp_path):
    """The scripts in a folder of their own, where they print their constants instead of running."""
    for name in (*SCRIPTS, "reward"):
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        body, main, _ = source.partition('if __name__ == "__main__":\n')
        source = f"{body}{main}    print(json.dumps(configure(sys.argv[1:])))\n" if main else source
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    return tmp_path


def constants(run, folder, script, *words) -> dict:
    return json.loads(done(run(folder / f"{script}.py", *words)).splitlines()[-1])


def edit(path: Path, names) -> None:
    """Adds 1 to every number in the lines of these constants."""
    source = path.read_text(encoding="utf-8")
    lines = source.split("\n")
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.Assign) and node.targets[0].id in names:
            for number in ast.walk(node.value):
                if isinstance(number, ast.Constant) and type(number.value) in (int, float):
                    number.value += 1
            lines[node.lineno - 1:node.end_lineno] = [ast.unparse(node)]
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize("model", ["tiny", "Qwen/Qwen2.5-0.5B", "lyrics"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_that_is_edited_in_the_source_is_the_one_that_runs(run, copies, script, model):
    words = ["task=lyrics", "model=tiny"] if model == "lyrics" else [f"model={model}"]
    before = constants(run, copies, script, *words)
    files = [copies / f"{name}.py" for name in (script, "reward")]
    expressions = {name: value for path in files for name, value in assignments(path).items()}
    assert before.keys() == expressions.keys()
    used = {node.id for value in expressions.values() for node in ast.walk(value) if isinstance(node, ast.Name)}
    numbers = {name for name, value in before.items() if type(value) in (int, float)}
    follow = {"THREADS", "BF16", "TINY", "LYRICS"}         # the machine or other constants
    assert all(re.search(r"\b\d", ast.unparse(expressions[name])) for name in numbers - follow)
    for names in (numbers - used - follow, numbers & used - follow):
        for path in files:
            edit(path, names)
        after = constants(run, copies, script, *words)
        for name in names:
            assert type(after[name]) is type(before[name]), name
            assert abs(after[name] - before[name]) == pytest.approx(1), name      # -3.0 becomes -(3.0 + 1)
        before = after


@pytest.mark.parametrize("script, words, expected", [
    ("eval", ["OUT=runs/x", "DATA=here"], {"DATA": "here", "SFT": "runs/x/sft", "TINY": True}),
    ("data_prep", ["--task=lyrics"], {"OUT": "runs/lyrics"}),
    ("grpo", ["TASK=lyrics"], {"OUT": "runs/lyrics", "SFT": "runs/lyrics/sft", "LYRICS": True, "BEST_BY": "reward"}),
    ("sft", ["MODEL=some/model"], {"TINY": False, "INIT_FROM": "some/model", "LORA_RANK": 32, "LOAD_4BIT": 1}),
    ("sft", ["MODEL=some/model", "LORA_RANK=0"], {"LORA_RANK": 0, "LOAD_4BIT": 0}),
    ("sft", ["MODEL=tiny", "LORA_RANK=8"], {"LORA_RANK": 8, "LOAD_4BIT": 1}),
    ("grpo", ["MODEL=tiny", "STEPS=50", "BETA=0"], {"STEPS": 50, "BETA": 0.0, "LORA_RANK": 0})])
def test_what_depends_on_a_constant_follows_it(run, copies, script, words, expected):
    assert expected.items() <= constants(run, copies, script, *words).items()


@pytest.mark.parametrize("script", SCRIPTS)
def test_constants_of_any_script_are_accepted_others_refused_and_help_shows_its_own(run, copies, script):
    own = constants(run, copies, script)
    every = {name for other in (*SCRIPTS, "reward") for name in assignments(ROOT / f"{other}.py")}
    assert constants(run, copies, script, *(f"{name}=1" for name in sorted(every - own.keys()))) == own
    output = refused(run(copies / f"{script}.py", "--sft_step=3"))
    assert "no script has a constant SFT_STEP" in output and "SFT_STEPS" in output
    output = refused(run(copies / f"{script}.py", "--seed=one"))
    assert "SEED" in output and "one" in output
    output = done(run(script, "--help"))
    assert "def main" not in output
    for name in assignments(ROOT / f"{script}.py"):
        assert re.search(rf"^{name} = .", output, re.MULTILINE), name


def test_run_stores_its_constants_and_an_edited_comment_changes_nothing(run, copies, tmp_path):
    settings = {"out": tmp_path / "run", **SFT, "sft_steps": 2}
    done(run("data_prep", **settings, **DATA))
    done(run("sft", **settings))
    stored = load(tmp_path / "run/sft/run.json")
    assert stored["constants"] == constants(run, copies, "sft", *(f"{name}={settings[name]}" for name in settings))
    assert {"torch", "transformers", "peft", "bitsandbytes"} <= stored["versions"].keys()
    for name in ("sft.py", "reward.py"):
        assert (tmp_path / "run/sft" / name).read_bytes() == (ROOT / name).read_bytes()
    source = (ROOT / "sft.py").read_text(encoding="utf-8")
    edited = source.replace("SEED = 0\n", "SEED = 0     # of everything\n")
    assert edited != source
    (copies / "sft.py").write_text(edited, encoding="utf-8")
    assert "is complete" in done(run(copies / "sft.py", **settings))


@pytest.mark.parametrize("line", ["STEPS: int = 7", "STEPS, LR = 7, 0.5", "STEPS=7"])
def test_a_constant_in_any_form_is_stored(run, copies, line):
    path = copies / "grpo.py"
    source = path.read_text(encoding="utf-8").replace("\nfree = {", f"\n{line}\nfree = {{", 1)
    path.write_text(source, encoding="utf-8")
    assert constants(run, copies, "grpo")["STEPS"] == 7


@pytest.mark.parametrize("word", ["CREDIT=step", "BASELINE=textbook", "AGGREGATE=tokens"])
def test_a_choice_that_there_is_not_is_refused_before_a_run_is_touched(run, tmp_path, word):
    row = {"prompt": "Make 24 from 1 2 3 4", "numbers": [1, 2, 3, 4]}
    write(tmp_path / "data/train.jsonl", row)
    write(tmp_path / "data/val.jsonl", {**row, "numbers": [2, 3, 4, 5]})
    assert "must be one of" in refused(run("grpo", word, out=tmp_path, data=tmp_path / "data"))
    assert not (tmp_path / "grpo").exists()


DIFFERENT = {"main", "summarise", "evaluate"}      # of one name in several scripts, but different on purpose
EXPECTED = {"configure", "open_run", "atomic_write", "sha256", "load_model", "encode_prompt", "completion_logprobs",
            "collate", "micro_batches", "halve_on_oom", "save_checkpoint", "load_checkpoint"}


def test_repeated_blocks_are_equal():
    copies = defaultdict(list)
    for script in SCRIPTS:
        source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                start = min(part.lineno for part in (node, *node.decorator_list))
                copies[node.name].append("\n".join(source.split("\n")[start - 1:node.end_lineno]))
    repeated = {name for name, sources in copies.items() if len(sources) > 1}
    assert EXPECTED <= repeated, "or remove a name from EXPECTED that is no longer repeated"
    assert [name for name in repeated - DIFFERENT if len(set(copies[name])) > 1] == []
