"""A recipe to copy: GRPO with a learned reward, from a classifier, instead of the rule. Run it after `make train`.

    python tests/learned_reward.py 0 OUT=runs/frozen        # constants of grpo.py can follow
    python tests/learned_reward.py 1 OUT=runs/updated       # the classifier is updated after every step
    python eval.py OUT=runs/table DATA=runs/game24/data POLICIES=frozen=runs/frozen/grpo,updated=runs/updated/grpo

The classifier is the SFT policy with a sequence-classification head. It learns which completions of that policy are
right; how often it ranks a right one above a wrong one on unseen hands is printed. The reward is its probability. Every
N steps (the first argument) it learns from the completions since its last update, labelled by the rule. Without
updates (0), the policy learns to write wrong answers that the classifier takes for right: in 30 steps the reward on val
rose from 0.88 to 0.98, while the accuracy first rose from 0.86 to 0.89, then fell to 0.83. parts/rule in log.jsonl is
the rule's reward.
"""

import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval  # noqa: E402
import grpo  # noqa: E402
import reward  # noqa: E402

TASK = "game24"              # its rule says which completions are right
SFT = f"runs/{TASK}/sft"
DATA = f"runs/{TASK}/data"
SAMPLES = 4                  # completions per training hand, from which the classifier first learns
FIRST_EPOCHS = 2
CLASSIFIER_LR = 3e-4


def fit(classifier, tokenizer, samples: list[tuple[str, float]], epochs: int) -> None:
    """Trains the classifier on texts labelled 1.0 if right, else 0.0, by cross-entropy."""
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=CLASSIFIER_LR)
    for epoch in range(epochs):
        order = random.Random(epoch).sample(samples, len(samples))
        for start in range(0, len(order), 32):
            texts, labels = zip(*order[start:start + 32])
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                logits(classifier, tokenizer, texts), torch.tensor(labels, device=grpo.DEVICE))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def logits(classifier, tokenizer, texts) -> torch.Tensor:
    inputs = tokenizer(list(texts), padding=True, return_tensors="pt").to(grpo.DEVICE)
    with torch.autocast(grpo.DEVICE, torch.bfloat16, enabled=bool(grpo.BF16)):
        return classifier(**inputs).logits[:, 0].float()


def as_sample(row: dict, completion: str, correct: float) -> tuple[str, float]:
    return f"{row['prompt']}\n{completion}", correct


def ranking_accuracy(classifier, tokenizer, samples: list[tuple[str, float]]) -> float:
    """Share of pairs of a right and a wrong completion in which the right one has the higher logit."""
    with torch.no_grad():
        values = torch.cat([logits(classifier, tokenizer, [text]) for text, _ in samples])
    is_right = torch.tensor([correct for _, correct in samples]) == 1
    return (values[is_right][:, None] > values[~is_right]).float().mean().item()


def main() -> None:
    update_every, argv = int(sys.argv[1]), [f"SFT={SFT}", f"DATA={DATA}", "BEST_BY=reward", *sys.argv[2:]]
    eval.configure(argv)
    sys.argv[1:] = [*argv, "TASK=learned"]
    constants = grpo.configure(sys.argv[1:])
    torch.set_num_threads(constants["THREADS"])
    torch.manual_seed(constants["SEED"])

    # completions by the SFT policy for one prompt per training hand
    rows = reward.read_rows(TASK, Path(constants["DATA"], "train.jsonl"), "prompt")
    rows = list({reward.identity(TASK, row): row for row in rows}.values())
    completed = eval.complete_rows(*eval.load_policy(constants["SFT"]), rows, range(1, SAMPLES + 1))
    unseen = {row["prompt"] for row in rows[-len(rows) // 4:]}
    samples = {True: [], False: []}
    for row in completed:
        samples[row["prompt"] in unseen].append(as_sample(row, row["completion"], row["correct"]))

    # the classifier learns from those for three quarters of the hands, and ranks the others
    tokenizer = AutoTokenizer.from_pretrained(constants["SFT"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    classifier = AutoModelForSequenceClassification.from_pretrained(
        constants["SFT"], num_labels=1, pad_token_id=tokenizer.pad_token_id).to(grpo.DEVICE)
    fit(classifier, tokenizer, samples[False], FIRST_EPOCHS)
    print(f"ranking accuracy on unseen hands: {ranking_accuracy(classifier, tokenizer, samples[True]):.3f}")

    # GRPO with its reward
    recent, rng = [], random.Random(constants["SEED"])

    def score_learned(completion: str, row: dict, truncated: bool) -> dict[str, float]:
        facts = reward.TASKS[TASK][1](completion, row, truncated)
        text, correct = as_sample(row, completion, facts["correct"])
        with torch.no_grad():
            probability = torch.sigmoid(logits(classifier, tokenizer, [text])).item()
        if row["id"].startswith("train"):        # it must not learn from val
            recent.append((text, correct))
        if len(recent) == update_every * constants["PROMPTS_PER_STEP"] * constants["GROUP_SIZE"]:
            older = rng.sample(samples[False], min(len(recent), len(samples[False])))        # lest it forget
            fit(classifier, tokenizer, recent + older, 1)
            samples[False].extend(recent)
            recent.clear()
        return {**facts, "rule": facts["reward"], "reward": probability}

    reward.TASKS["learned"] = (reward.TASKS[TASK][0], score_learned)
    grpo.main()


if __name__ == "__main__":
    main()
