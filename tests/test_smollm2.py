"""Real weights through the pretrained path: SmolLM2-135M-Instruct, which `make test` writes once to models/smollm2."""

import json

import pytest
import torch
from commands import ROOT, die, done, killed, load, read, write
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import grpo

FOLDER = ROOT / "models/smollm2"
PROMPTS = ["Make 24 from 1 2 3 4", "What is the capital of France?", "Say hello.", "Count: one, two,"]
# the turns of the models that the README names, as far as they matter here: a default system message, what opens the
# answer, and reasoning that the template opens itself
QWEN = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TEMPLATES = {
    "smollm2": None,
    "qwen2.5": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.<|im_end|>\n" + QWEN,
    "qwen3": QWEN + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
    "deepseek-r1": "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
                   "{% if add_generation_prompt %}<|im_end|><think>\n{% endif %}"}
COMPLETION = "<think>\n4 3 | 4 * 3 = 12\n</think>\n<answer> 12 </answer>"
POLICY = {"model": FOLDER, "lora_rank": 8, "gradient_checkpointing": 0}

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="`make smollm2` writes models/smollm2")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_prompt_ends_where_the_completion_begins(template):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    tokenizer.chat_template = TEMPLATES[template] or tokenizer.chat_template
    conversation = [{"role": "user", "content": PROMPTS[0]}]
    turn = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    prompt_ids = grpo.encode_prompt(tokenizer, PROMPTS[0])
    text = turn.removesuffix("<think>\n") + COMPLETION
    assert prompt_ids + tokenizer(COMPLETION).input_ids == tokenizer(text).input_ids
    assert tokenizer.decode(prompt_ids) + COMPLETION == text and text.count("<think>") == 1


def test_greedy_rollout_is_that_of_transformers(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    prompt_ids = [grpo.encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    width = max(map(len, prompt_ids))
    eos_ids = [tokenizer.eos_token_id, tokenizer(".").input_ids[0]]
    settings = GenerationConfig(max_new_tokens=24, do_sample=False, temperature=None, top_p=None, top_k=None,
                                repetition_penalty=1.0, eos_token_id=eos_ids, pad_token_id=0)
    completions = model.generate(
        torch.tensor([[0] * (width - len(ids)) + ids for ids in prompt_ids]), generation_config=settings,
        attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids]))
    expected = []
    for ids in completions[:, width:].tolist():
        ends = [place + 1 for place, token in enumerate(ids) if token in eos_ids]
        expected.append(ids[:ends[0]] if ends else ids)
    assert len({len(ids) for ids in expected}) > 1 and "Paris" in tokenizer.decode(expected[1])
    assert grpo.rollout(model, prompt_ids, max_new_tokens=24, temperature=0, top_p=1.0, eos_ids=eos_ids) == expected


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One hand to learn by heart, and others."""
    folder = tmp_path_factory.mktemp("data")
    completion = "<think>\n4 3 2 1 | 4 * 3 = 12\n12 2 1 | 12 * 2 = 24\n24 1 | 24 * 1 = 24\n</think>"
    for split, last in (("train", 4), ("val", 5)):
        rows = [{"prompt": f"Make 24 from {n} 2 3 {last}", "completion": completion, "numbers": [n, 2, 3, last]}
                for n in (1, 2)]
        write(folder / f"{split}.jsonl", *rows)
    return folder


@pytest.fixture(scope="module")
def sft(run, data, tmp_path_factory):
    """An SFT policy, NF4 and LoRA, whose training was killed and resumed."""
    root = tmp_path_factory.mktemp("smollm2")
    settings = {**POLICY, "out": root, "data": data, "sft_steps": 6, "sft_lr": 3e-3, "sft_warmup": 0,
                "batch_tokens": 128, "sft_eval_every": 6, "save_every": 1}
    killed(run("sft", before=die("torch.nn.utils.clip_grad_norm_", "len(calls) == 4"), **settings))
    assert "resuming" in done(run("sft", **settings))
    return root / "sft"


def test_the_loss_of_sft_falls_over_a_kill(sft):
    losses = [entry["loss"] for entry in read(sft / "log.jsonl")]
    assert len(losses) == 6 and losses[-1] < losses[0] / 2
    assert load(sft / "adapter_config.json")["base_model_name_or_path"] == str(FOLDER)


def test_three_steps_of_grpo_raise_a_reward_that_can_be_raised_at_once(run, sft, data, tmp_path):
    early = ("import reward; reward.score = lambda task, text, row, truncated: {'reward': -len(text) / 100, "
             "'correct': float(not truncated), 'answered': 1.0}")
    settings = {**POLICY, "out": tmp_path, "sft": sft, "data": data, "steps": 3, "lr": 3e-3, "warmup": 0, "min_lr": 1,
                "prompts_per_step": 2, "group_size": 6, "max_new_tokens": 12, "temperature": 1.3, "eval_every": 3,
                "credit": "answer", "beta": 0.001}
    done(run("grpo", before=early, **settings))
    log = read(tmp_path / "grpo/log.jsonl")[1:]
    assert log[0]["kl"] == 0 and log[0]["ratio_error"] < 1e-4 and log[0]["sampler_error"] < 0.05 and log[1]["kl"] > 0
    assert log[2]["reward"] > log[0]["reward"] + log[0]["reward_std"] / 2


def test_a_rollout_changes_no_gradient_and_the_export_is_the_policy(run, sft, data, tmp_path, monkeypatch, tokenizer):
    for name, value in {"DEVICE": "cpu", "TINY": False, "LORA_RANK": 8, "LOAD_4BIT": 1, "BF16": 0, "BETA": 0.0,
                        "GRADIENT_CHECKPOINTING": 0, "TEMPERATURE": 1.0}.items():
        monkeypatch.setattr(grpo, name, value)
    model, _ = grpo.load_model(str(sft))
    prompt_ids = [grpo.encode_prompt(tokenizer, row["prompt"]) for row in read(data / "val.jsonl")]
    input_ids, loss_mask = grpo.collate([(ids + prompt_ids[0][:8], len(ids)) for ids in prompt_ids])
    batch = {"input_ids": input_ids, "loss_mask": loss_mask, "lengths": [input_ids.shape[1]] * 2,
             "advantages": torch.ones(loss_mask.shape), "sampler_logprobs": torch.zeros(loss_mask.shape)}

    def gradients():
        grpo.accumulate_gradient(model.train(), batch)
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}

    before = gradients()
    greedy = grpo.rollout(model, prompt_ids, max_new_tokens=16, temperature=0, top_p=1.0, eos_ids=[2])
    assert len(before) == 2 * 7 * 30 and all(torch.equal(value, before[name]) for name, value in gradients().items())

    done(run("eval", model=FOLDER, out=tmp_path, data=data, policies=f"sft={sft}", export=tmp_path / "export"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template == tokenizer.chat_template
    assert "quantization_config" not in json.loads((tmp_path / "export/config.json").read_text())
    assert grpo.rollout(exported, prompt_ids, max_new_tokens=16, temperature=0, top_p=1.0, eos_ids=[2]) == greedy
