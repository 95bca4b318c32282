"""What every test file shares: where the real models lie, and tiny random ones."""
import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / "models/smollm2-135m-instruct"
MINILM = ROOT / "models/all-minilm-l6-v2"
sys.path.insert(0, str(ROOT))

torch.backends.cuda.matmul.allow_tf32 = False


def pytest_addoption(parser):
    parser.addoption("--heavy", action="store_true", help="also the tests marked heavy: full sweeps")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "heavy" in item.keywords and not config.getoption("--heavy"):
            item.add_marker(pytest.mark.skip(reason="heavy: runs with --heavy (make test-all)"))


@pytest.fixture(scope="session")
def smollm2():
    """The folder of the real SmolLM2-135M-Instruct."""
    if not (SMOLLM2 / "config.json").is_file():
        pytest.skip("no models/smollm2-135m-instruct: python demo/fetch.py")
    return SMOLLM2


@pytest.fixture(scope="session")
def minilm():
    """The folder of the real all-MiniLM-L6-v2."""
    if not (MINILM / "config.json").is_file():
        pytest.skip("no models/all-minilm-l6-v2: python demo/fetch.py")
    return MINILM
