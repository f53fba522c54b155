import sys
from pathlib import Path

import pytest
from commands import Commands

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # tests import the scripts from the repository root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()
