"""The recipe of a learned reward, small: the policy is trained by the classifier, the classifier by the rule."""

from commands import DATA, GRPO, ROOT, TRAINED, done, read

RECIPE = ROOT / "tests/learned_reward.py"


def test_a_learned_reward(run, tmp_path):
    done(run("data_prep", out=tmp_path, **DATA))
    done(run("sft", out=tmp_path, **TRAINED))
    settings = {**GRPO, "sft": tmp_path / "sft", "data": tmp_path / "data", "steps": 4}
    logs = {}
    for update_every in (0, 2):
        output = done(run(RECIPE, str(update_every), out=tmp_path / str(update_every), **settings))
        assert 0 <= float(output.partition("ranking accuracy on unseen hands: ")[2].split()[0]) <= 1
        logs[update_every] = read(tmp_path / str(update_every) / "grpo/log.jsonl")
        for entry in logs[update_every][1:]:
            assert 0 < entry["reward"] < 1 and entry["reward"] != entry["parts/rule"] and entry["grad_norm"] > 0
    frozen, updated = logs.values()
    rewards = [[entry["reward"] for entry in log[1:]] for log in (frozen, updated)]
    # the same until the classifier has learned from two steps, at the end of the second one
    assert rewards[0][:2] == rewards[1][:2] and rewards[0][2] != rewards[1][2]
