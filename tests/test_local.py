"""A teacher that is a tiny model here, beside generate.generate."""
from collections import Counter

import pytest
import torch
from conftest import tiny

from calls import Call, Store
from files import InputError
from generate import generate
from local import Local, settings_of
from teachers import Teacher
from weights import weights_sha256

pytest.importorskip("jsonschema", reason="no jsonschema: pip install -e '.[synth]'")
SCHEMA = {"type": "object", "properties": {"score": {"type": "integer"}}, "required": ["score"]}


def ask(text, schema=None, **parameters):
    return Call(({"role": "user", "content": text},), parameters, schema)


def answers(teacher, *given):
    return [reply for _, reply in sorted(teacher.ask(given), key=lambda pair: pair[0])]


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "calls.sqlite")
    yield store
    store.close()


class Letters:
    """A tokenizer of the tiny model: a prompt's ids are its characters', an answer's text is its ids."""
    silent = frozenset(range(10, 60))

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.fixture
def here(store, monkeypatch):
    """A Teacher of a tiny model in fp32, which stops at two ids."""
    monkeypatch.setattr("local.render_chat", lambda tokenizer, messages, add_generation_prompt: (
        [ord(c) % 97 for message in messages for c in message["content"][-60:]], []))
    pool = Local.__new__(Local)
    pool.store, pool.window, pool.counts, pool.model = store, 4, Counter(), "local:tiny"
    pool.tokenizer, pool.stop_ids, pool.llama = Letters(), {3, 4, 5}, tiny(torch.float32)
    return Teacher(store, pool)


def test_a_local_teacher_gives_what_generate_gives(here):
    given = [ask("ab" * n, max_tokens=10, temperature=0.9, top_p=0.8, seed=n % 2) for n in range(1, 8)]
    kinds = set()
    for call, reply in zip(given, answers(here, *given)):
        prompt = [ord(c) % 97 for c in call.messages[0]["content"]]
        for room in (10, 20):
            ids = list(generate(here.pool.llama, prompt, max_new_tokens=room, temperature=0.9, top_p=0.8,
                                seed=call.parameters["seed"], stop_ids=here.pool.stop_ids))
            if ids[-1] in here.pool.stop_ids:
                break
        kinds.add((ids[-1] in here.pool.stop_ids, room))
        if ids[-1] in here.pool.stop_ids:
            shown = " ".join(str(i) for i in ids[:-1] if i not in Letters.silent)
            assert (reply.text or "") == shown and reply.finish_reason == "stop"
        else:
            assert reply.failure == "cut by length at 20 tokens"
        assert here.store.get(reply.key) == reply
    assert len(kinds) >= 2, kinds
    before = here.counts["requests"]
    assert len(answers(here, *given)) == 7 and here.counts["requests"] == before


def test_the_defaults_of_a_local_teacher_are_the_apis():
    assert dict(settings_of({})) == {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 1024, "seed": 0}
    assert dict(settings_of({"max_completion_tokens": 5, "seed": 2})) == {
        "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 5, "seed": 2}


def test_a_local_teacher_says_what_it_cannot_do(here):
    long, wrong, full, whole = answers(
        here, Call(tuple({"role": "user", "content": "a" * 60} for _ in range(5))), ask("a", stop=["b"]),
        Call(tuple({"role": "user", "content": "a" * 60} for _ in range(4)), {"max_tokens": 500, "temperature": 0}),
        ask("b", max_tokens=1))
    assert "300 tokens; expected 1 to 256" in long.failure and "found the parameter stop = ['b']" in wrong.failure
    assert full.failure == "the model's context is full" and full.usage["completion_tokens"] == 17
    assert whole.failure is None or whole.failure.startswith("cut by length at 2 ")


def test_a_local_teacher_is_asked_once_more_for_json(here, monkeypatch):
    said = iter(["no", '{"score": 1}', '{"score": 2}'])
    monkeypatch.setattr(Letters, "decode", lambda self, ids: next(said))
    here.pool.stop_ids = set(range(97))
    first, second = answers(here, ask("a", SCHEMA), ask("b", SCHEMA))
    assert (first.value, first.repaired, second.value, second.repaired) == ({"score": 2}, True, {"score": 1}, False)


def test_a_folder_is_named_by_its_weights(base, store):
    teacher = Teacher.open(f"local:{base}", store, device="cpu", dtype="fp32")
    name, _, digest = teacher.model.partition("@")
    assert name == "local:model" and digest == weights_sha256(base)[:12]
    reply, = answers(teacher, ask("Hi", max_tokens=2, temperature=0))
    assert reply.failure == "cut by length at 4 tokens" and reply.usage["prompt_tokens"] > 2 * 20
    with pytest.raises(InputError, match="does not exist; expected the folder of a model"):
        Teacher.open(f"local:{base}x", store)
