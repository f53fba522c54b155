"""The scripts repeat a few blocks on purpose, so that each can be copied alone; this holds the copies equal."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("data_prep", "sft", "grpo", "eval")
DIFFERENT = {"main", "is_tiny", "summarise"}       # the same question, another answer


def functions():
    found = defaultdict(dict)
    for script in SCRIPTS:
        source = (ROOT / f"{script}.py").read_text(encoding="utf-8") if (ROOT / f"{script}.py").exists() else ""
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in DIFFERENT:
                found[node.name][script] = ast.get_source_segment(source, node)
    return found


def test_repeated_blocks_are_equal():
    repeated = {name: copies for name, copies in functions().items() if len(copies) > 1}
    assert {"override_constants", "load_model", "KVCache", "save_checkpoint"} <= set(repeated)
    for name, copies in repeated.items():
        assert len(set(copies.values())) == 1, f"{name} differs between {', '.join(copies)}"
