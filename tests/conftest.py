import subprocess
import sys

import pytest
from commands import ROOT, Commands

sys.path.insert(0, str(ROOT))     # tests import the scripts from the repository root
import reward  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The data folder of the embedded corpus; the reward knows its texts."""
    out = tmp_path_factory.mktemp("corpus")
    subprocess.run([sys.executable, ROOT / "data_prep.py", "TASK=lyrics", "VARIANTS=3", f"OUT={out}"], check=True)
    reward.use_data("lyrics", out / "data")
    yield out / "data"
    reward.table.clear()
