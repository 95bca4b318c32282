"""What every test file shares: where the real models lie, and tiny random ones."""
import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
from dataclasses import replace

import pytest
import torch

import model as M

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / "models/smollm2-135m-instruct"
MINILM = ROOT / "models/all-minilm-l6-v2"
sys.path.insert(0, str(ROOT))

CONFIG = M.LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=16, max_position_embeddings=512, rope_scaling=None)

torch.backends.cuda.matmul.allow_tf32 = False


def pytest_addoption(parser):
    parser.addoption("--heavy", action="store_true", help="also the tests marked heavy: full sweeps")
    parser.addoption("--gpu", action="store_true", help="the tests of tests/test_gpu.py, and only those")


def pytest_configure(config):
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that the other tests do the same on every machine


def pytest_collection_modifyitems(config, items):
    gpu = config.getoption("--gpu")
    if gpu and not torch.cuda.is_available():
        raise pytest.UsageError("--gpu: torch finds no CUDA device")
    for item in items:
        if ("gpu" in item.keywords) != gpu:
            item.add_marker(pytest.mark.skip(reason="on a GPU only: make test-gpu" if not gpu else "not of --gpu"))
        elif "heavy" in item.keywords and not config.getoption("--heavy"):
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


@pytest.fixture(scope="session")
def base(smollm2, tmp_path_factory):
    """A tiny random model with SmolLM2's vocabulary, tied, in bf16."""
    folder = tmp_path_factory.mktemp("base") / "model"
    config = replace(CONFIG, vocab_size=49152, hidden_size=32, max_position_embeddings=8192, tie_word_embeddings=True)
    M.save_model(M.Llama(config).init_weights(2).to(torch.bfloat16), folder, source=smollm2)
    return folder
