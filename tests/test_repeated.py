"""The scripts repeat a few blocks on purpose, so that each can be copied alone; this holds the copies equal."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIFFERENT = {"main", "summarise", "evaluate"}      # these differ on purpose
EXPECTED = {"configure", "open_run", "written_aside", "sha256", "load_model", "encode_prompt", "completion_logprobs",
            "collate", "micro_batches", "halve_on_oom", "save_checkpoint", "load_checkpoint", "write_policy"}


def test_repeated_blocks_are_equal():
    copies = defaultdict(dict)
    for script in ("data_prep", "sft", "grpo", "eval"):
        source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                start = min(part.lineno for part in (node, *node.decorator_list))
                copies[node.name][script] = "\n".join(source.split("\n")[start - 1:node.end_lineno])
    repeated = {name for name, sources in copies.items() if len(sources) > 1}
    assert EXPECTED <= repeated, "or remove a name from EXPECTED that is no longer repeated"
    for name in repeated - DIFFERENT:
        assert len(set(copies[name].values())) == 1, f"{name} differs between {', '.join(copies[name])}"
