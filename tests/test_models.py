"""Models and surroundings that users bring: a clear line, or the right tokens."""

import pytest
import torch
from commands import refused, write
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import sft

WORDS = {word: index for index, word in enumerate("<pad> <bos> <eos> Make 24 from 1 2025 end\n".split(" "))}


def word_tokenizer(template):
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, WORDS[name]) for name in ("<bos>", "<eos>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


def test_a_prompt_has_the_bos_of_the_tokenizer_and_no_eos():
    assert sft.encode_prompt(word_tokenizer("<bos> $A <eos>"), "Make 24 end") == [1, 3, 4, 8]
    assert sft.encode_prompt(word_tokenizer("$A"), "Make 24 end") == [3, 4, 8]


def test_a_template_with_the_date_of_today_gives_the_same_prompt_every_day():
    tokenizer = word_tokenizer("$A")
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    assert sft.encode_prompt(tokenizer, "Make 24") == [WORDS["1"], 0, WORDS["2025"], 3, 4]


@pytest.mark.parametrize("bf16, tolerance", [(0, 1e-5), (1, 0.05)])
def test_muon_is_that_of_torch(monkeypatch, bf16, tolerance):
    monkeypatch.setattr(sft, "BF16", bf16)
    if not bf16:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)        # torch's always multiplies in bf16
    ours, theirs = ([torch.nn.Parameter(torch.linspace(-1, 1, 24 * rows).view(rows, 24).sin())
                     for rows in (8, 8, 24, 40, 40)] for _ in range(2))
    optimizers = [sft.Muon(ours, {"lr": 0.01, "weight_decay": 0.1}),
                  torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]
    start = [matrix.detach().clone() for matrix in ours]
    for seed in range(4):
        for parameters, optimizer in zip((ours, theirs), optimizers):
            torch.manual_seed(seed)
            for matrix in parameters:
                matrix.grad = torch.randn_like(matrix)
            optimizer.step()
    for before, a, b in zip(start, ours, theirs):
        assert (a - b).norm() < tolerance * (a - before).norm()


@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_samples_beyond_the_positions_of_the_model_are_named_before_training(run, tmp_path, script):
    row = {"prompt": "Make 24 from 1 1 1 1", "completion": "1 1 1 1 1", "numbers": [1, 1, 1, 1]}
    folder = tmp_path / "model"
    model, tokenizer = sft.new_tiny_model([row["prompt"]])
    model.config.max_position_embeddings = 8
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write(tmp_path / "data/train.jsonl", row)
    write(tmp_path / "data/val.jsonl", {**row, "numbers": [1, 1, 1, 2]})
    output = refused(run(script, model="tiny", init_from=folder, sft=folder, out=tmp_path, data=tmp_path / "data"))
    assert "knows only 8 positions" in output and not list(tmp_path.glob("*/step-*.pt"))


@pytest.mark.parametrize("script", ["sft", "grpo", "eval"])
def test_a_gpu_that_does_not_work_stops_with_its_reason_and_trains_no_tiny_model(run, tmp_path, script):
    for number, split in enumerate(("train", "val", "test"), 1):
        write(tmp_path / f"data/{split}.jsonl", {"prompt": f"Make 24 from 1 1 1 {number}", "completion": "1",
                                                 "numbers": [1, 1, 1, number]})
    # a driver that is too old: the device is there, but torch cannot use it
    no_driver = ("import os; exists = os.path.exists; "
                 "os.path.exists = lambda path: path == '/dev/nvidia0' or exists(path)")
    output = refused(run(script, before=no_driver, out=tmp_path, data=tmp_path / "data", sft="some/model"))
    assert "CUDA" in output and "DEVICE=cpu" in output and not (tmp_path / script).exists()
