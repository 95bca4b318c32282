"""reward.py beside transformers' LlamaForSequenceClassification, and what it refuses."""
import json

import pytest
import torch
import transformers
from conftest import CONFIGS, LLAMA3, TINY, say, tiny_vocabulary
from safetensors.torch import load_file, save_file

import reward
from chat import render_chat
from files import InputError
from reward import load_reward, rewards

SHAPES = {"kv heads": {**TINY, "vocab_size": 600, "rope_parameters": LLAMA3, "max_position_embeddings": 131072},
          "tied": {**TINY, "vocab_size": 600, "num_key_value_heads": 1, "tie_word_embeddings": True},
          "head_dim": {**CONFIGS["head_dim is not width / heads"], "vocab_size": 600}}
TALKS = [say("Why?", "Because."), say("The patient has pain in the chest and a fever.", "Which drug would you give?"),
         say("asthma", "pain", "a fever after surgery?", "the " * 90, system="Be brief."), say("?", "xyzzy 42 " * 7),
         say("Why?", "So."), say("pain " * 20, "fever")]


@pytest.fixture(scope="module", params=["chatml", "llama3"])
def vocabulary(request, tmp_path_factory):
    return tiny_vocabulary(tmp_path_factory.mktemp("vocabulary") / "v", request.param)


def classifier(folder, vocabulary, shape="kv heads", cls=transformers.LlamaForSequenceClassification, **settings):
    """transformers' model of random weights, saved to `folder` with a vocabulary."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**{**SHAPES[shape], "num_labels": 1, "pad_token_id": 0, **settings})
    theirs = cls(config).eval()
    theirs.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((vocabulary / "tokenizer.json").read_bytes())
    return theirs


def expected(theirs, tokenizer, talks):
    """transformers' logit of each conversation, one by one."""
    with torch.no_grad():
        return torch.stack([theirs(torch.tensor([render_chat(tokenizer, talk)[0]])).logits[0, 0] for talk in talks])


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(vocabulary, shape, tmp_path):
    theirs = classifier(tmp_path, vocabulary, shape)
    model, tokenizer = load_reward(tmp_path, dtype=torch.float32)
    wanted = expected(theirs, tokenizer, TALKS)
    assert wanted.std() > 0.1  # so that an order mixed up would show
    torch.testing.assert_close(torch.tensor(rewards(model, tokenizer, TALKS)), wanted, rtol=0, atol=1e-4)


def test_a_batch_of_transformers_with_padding_gives_the_same(vocabulary, tmp_path):
    """The reward is the logit at the last token that is no padding, wherever the row ends."""
    theirs = classifier(tmp_path, vocabulary)
    model, tokenizer = load_reward(tmp_path, dtype=torch.float32)
    rows = [render_chat(tokenizer, talk)[0] for talk in TALKS]
    assert all(row[-1] != 0 for row in rows)
    longest = max(map(len, rows))
    ids, mask = (torch.tensor([[*row, *[fill] * (longest - len(row))] for row in table]) for table, fill in (
        (rows, 0), ([[1] * len(row) for row in rows], 0)))
    with torch.no_grad():
        wanted = theirs(ids, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(torch.tensor(rewards(model, tokenizer, TALKS)), wanted, rtol=0, atol=1e-4)


def test_batches_equal_one_by_one_and_hold_what_they_may(vocabulary, tmp_path, monkeypatch):
    classifier(tmp_path, vocabulary)
    model, tokenizer = load_reward(tmp_path, dtype=torch.float32)
    alone = [rewards(model, tokenizer, [talk])[0] for talk in TALKS]
    seen = []
    collate = reward.collate
    monkeypatch.setattr(reward, "collate", lambda examples, packed: seen.append([len(ids) for _, ids, _ in examples])
                        or collate(examples, packed))
    for budget in (1, 200, 100_000):
        seen.clear()
        torch.testing.assert_close(rewards(model, tokenizer, iter(TALKS), batch_tokens=budget), alone, rtol=0,
                                   atol=2e-5)
        assert all(len(lengths) == 1 or sum(lengths) <= budget for lengths in seen)
        assert (len(seen) == len(TALKS)) == (budget == 1) and (len(seen) == 1) == (budget == 100_000)
    assert rewards(model, tokenizer, []) == []


def test_bf16_is_near(vocabulary, tmp_path):
    theirs = classifier(tmp_path, vocabulary, initializer_range=0.05)
    model, tokenizer = load_reward(tmp_path)
    assert model.head.weight.dtype == torch.bfloat16
    wanted = expected(theirs, tokenizer, TALKS)
    assert (torch.tensor(rewards(model, tokenizer, TALKS)) - wanted).abs().max() < 0.05 * wanted.abs().max()
    same, other = load_reward(tmp_path, seed=0)[0], load_reward(tmp_path, seed=1)[0]
    assert torch.equal(model.head.weight, same.head.weight)
    assert not torch.equal(model.layers[0].mlp.down.weight, other.layers[0].mlp.down.weight)


def test_a_head_of_the_vocabulary_beside_the_score_is_not_read(vocabulary, tmp_path):
    theirs = classifier(tmp_path, vocabulary)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.ones(600, 64)}, tmp_path / "model.safetensors", {"format": "pt"})
    model, tokenizer = load_reward(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(torch.tensor(rewards(model, tokenizer, TALKS)), expected(theirs, tokenizer, TALKS),
                               rtol=0, atol=1e-4)

# ----- refused -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return tiny_vocabulary(tmp_path_factory.mktemp("vocabulary") / "v", "chatml")


def test_a_causal_model_is_refused_by_name(chatml, tmp_path):
    classifier(tmp_path, chatml, cls=transformers.LlamaForCausalLM)
    with pytest.raises(InputError, match=r"found LlamaForCausalLM without score\.weight; expected LlamaForSequenceC"):
        load_reward(tmp_path)


def test_several_labels_are_refused(chatml, tmp_path):
    classifier(tmp_path, chatml, num_labels=3)
    with pytest.raises(InputError, match=r"config\.json: num_labels is 3; expected 1"):
        load_reward(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if key != "id2label"}))
    with pytest.raises(InputError, match=r"score\.weight is \[3, 64\]; expected \[1, 64\]"):
        load_reward(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw | {"id2label": {"0": "reward"}, "num_labels": 2}))
    with pytest.raises(InputError, match="num_labels is 2"):
        load_reward(tmp_path)


@pytest.mark.parametrize("change, fault", [
    (lambda tensors: tensors.pop("model.norm.weight"), r"missing model\.norm\.weight"),
    (lambda tensors: tensors.update({"score.bias": torch.zeros(1)}), r"not expected score\.bias")])
def test_tensors_that_do_not_fit_are_named(change, fault, chatml, tmp_path):
    classifier(tmp_path, chatml)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=fault):
        load_reward(tmp_path)


def test_a_vocabulary_beyond_the_rows_is_refused(chatml, tmp_path):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**{**TINY, "vocab_size": 300, "num_labels": 1})
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((chatml / "tokenizer.json").read_bytes())
    with pytest.raises(InputError, match="expected all below vocab_size, 300"):
        load_reward(tmp_path)


def test_a_bad_conversation_is_named(chatml, tmp_path):
    classifier(tmp_path, chatml, "tied", max_position_embeddings=64)
    model, tokenizer = load_reward(tmp_path)
    with pytest.raises(InputError, match=r"conversation 2 has \d+ tokens; expected at most 64"):
        rewards(model, tokenizer, [TALKS[0], say("Why?", "fever " * 80)])
    with pytest.raises(InputError, match="conversation 2: found no messages"):
        rewards(model, tokenizer, [TALKS[0], []])
    with pytest.raises(InputError, match="conversation 1: the last message is the user's; expected the assistant's"):
        rewards(model, tokenizer, [say("Why?")])


def test_a_model_without_notice_is_loaded_in_silence(chatml, tmp_path, capsys):
    classifier(tmp_path, chatml, "tied")
    capsys.readouterr()
    load_reward(tmp_path)
    assert capsys.readouterr().err == ""
