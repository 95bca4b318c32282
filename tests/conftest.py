"""Shared by all test files: the folders of the real models, tiny random models, and random rows for them."""
import asyncio
import contextlib
import gzip
import json
import math
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
from dataclasses import replace

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import model as M
from calls import Reply, key_of
from encoder import Encoder
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / "models/smollm2-135m-instruct"
MINILM = ROOT / "models/all-minilm-l6-v2"
sys.path.insert(0, str(ROOT))

CONFIG = M.LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=16, max_position_embeddings=512, rope_scaling=None)
# of the runs over several ranks: 32 is no multiple of 3
RUN_CONFIG = M.LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
                           rope_scaling=None, tie_word_embeddings=True)

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


def with_smollm2_s_tokenizer(smollm2, folder, seed, **sizes):
    """Writes a tiny random model with the tokenizer of `smollm2`, tied, in bf16, to `folder`."""
    config = replace(CONFIG, max_position_embeddings=8192, tie_word_embeddings=True, **sizes)
    M.save_model(M.Llama(config).init_weights(seed).to(torch.bfloat16), folder, source=smollm2)
    return folder


@pytest.fixture(scope="session")
def base(smollm2, tmp_path_factory):
    """The folder of a tiny random model with SmolLM2's vocabulary."""
    return with_smollm2_s_tokenizer(smollm2, tmp_path_factory.mktemp("base") / "model", 2, vocab_size=49152,
                                    hidden_size=32)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The folder of a tiny random model with tied weights, stored in fp32."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    M.save_model(M.Llama(RUN_CONFIG).init_weights(1), folder)
    return folder


@pytest.fixture(scope="session")
def too_few_rows(smollm2, tmp_path_factory):
    """The folder of a tiny random model of 49,151 rows with a tokenizer of 49,152 ids."""
    return with_smollm2_s_tokenizer(smollm2, tmp_path_factory.mktemp("too_few_rows") / "model", 3, vocab_size=49151,
                                    hidden_size=8)


@pytest.fixture(scope="session")
def declared_tied(base, tmp_path_factory):
    """The folder of `base` with a head of other numbers than the embedding's beside it, still declared tied."""
    folder = tmp_path_factory.mktemp("declared_tied") / "model"
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

# ----- models, rows and files for training ---------------------------------------------------------------------------


def tiny_llama(seed=1, tied=False):
    return M.Llama(replace(CONFIG, tie_word_embeddings=tied)).init_weights(seed)


def gradients(model, loss):
    """{name: gradient of `loss`}."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(one, other, relative):
    """Every tensor of the dict `one` is, at its worst element, within `relative` of its largest of that in `other`."""
    for name in one:
        assert (one[name] - other[name]).abs().max() <= relative * one[name].abs().max(), name


def random_examples(lengths, seed=0):
    """SFT rows of random ids, of which 70 % are trained."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in lengths:
        ids = rng.integers(0, 300, n).astype(np.int32)
        labels = np.append(ids[1:], ids[:1])
        labels[rng.random(n) < 0.3] = -100
        rows.append(("", ids, labels))
    return rows


def random_pairs(sizes, seed=0):
    """DPO pairs of random ids; sizes [(of the prompt, the chosen, the rejected answer), …]."""
    rng = np.random.default_rng(seed)
    return [(f"pair {i}", *(rng.integers(0, 300, n).astype(np.int32) for n in own)) for i, own in enumerate(sizes)]


def said(role, content):
    return {"role": role, "content": content}


def say(*turns, system=None):
    """The messages of a talk in which user and assistant take turns."""
    messages = [said("system", system)] if system is not None else []
    return messages + [said(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)]


def write_jsonl(path, rows):
    """Writes dicts, or lines as they are, to a .jsonl or .jsonl.gz file; its name."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)

# ----- encoders and texts --------------------------------------------------------------------------------------------

WORDS = ["the", "patient", "has", "pain", "in", "chest", "and", "a", "fever", "after", "surgery", "which", "drug",
         "would", "you", "give", "for", "asthma"]


def random_texts(count, seed=0, longest=60):
    """Sentences of 0 to `longest` known and unknown words."""
    rng = np.random.default_rng(seed)
    vocabulary = [*WORDS, "xyzzy", "Zoë", "[", "]", "42", "肺炎", "?"]
    return [" ".join(rng.choice(vocabulary, rng.integers(0, longest))) for _ in range(count)]


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def one_thread():
    """Small work on shared cores is faster with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", name="tiny")  # of the tests that import no function of this name
def tiny_bert(tmp_path_factory):
    """The Encoder of a random two-layer BERT."""
    return Encoder.from_dir(tiny_encoder(tmp_path_factory.mktemp("encoder") / "bge-tiny-en")[0])


def tiny_encoder(directory, pooling="cls", prefix="", seed=0, max_seq_length=40, lower_case=True):
    """A random two-layer BERT in sentence-transformers' layout; every tensor is random, so that each one matters."""
    from transformers import BertConfig, BertModel
    pieces = [*WORDS, *"abcdefghijklmnopqrstuvwxyz0123456789[]?", *("##" + c for c in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *pieces]))}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")])
    tokenizer.enable_truncation(7)  # as published files do: what is stored here must not be obeyed
    tokenizer.enable_padding(length=9)
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=80, max_position_embeddings=64, layer_norm_eps=0.02)
    torch.manual_seed(seed)
    model = BertModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("LayerNorm.weight" in name), 0.3)
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "config.json", config.to_dict() | {"model_type": "bert", "architectures": ["BertModel"]})
    write_json(directory / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]",
        "unk_token": "[UNK]"})
    write_json(directory / "modules.json", [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}])
    write_json(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": 48, **{
        f"pooling_mode_{name}": name.startswith(pooling) for name in ("cls_token", "mean_tokens", "max_tokens")}})
    write_json(directory / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": True})
    save_file({prefix + name: tensor for name, tensor in model.state_dict().items()}, directory / "model.safetensors")
    return directory, model

# ----- vocabularies --------------------------------------------------------------------------------------------------

CONTROL_TOKENS = {"chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                  "llama3": ["<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                             "<|eot_id|>"]}
LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def tiny_vocabulary(folder, template, *more):
    """Writes a tokenizer.json of 600 tokens that cuts text as SmolLM2's ("chatml") or Llama 3's ("llama3") does, with
    the control tokens of that template and of `more`."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    cut = pre_tokenizers.Digits(individual_digits=True) if template == "chatml" else \
        pre_tokenizers.Split(tokenizers.Regex(LLAMA3_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=template == "chatml")])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        random_texts(300) + ["system\n", "user\n", "assistant\n\n", "fever?"] * 9, trainers.BpeTrainer(
            vocab_size=600, special_tokens=[token for name in (template, *more) for token in CONTROL_TOKENS[name]],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def tiny_sentencepiece(folder):
    """Writes a tokenizer.model of 440 pieces, BPE with byte fallback as Llama 2's."""
    folder.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(random_texts(300) + ["[INST] <<SYS>> <</SYS>> [/INST]"] * 50), vocab_size=440,
        model_prefix=str(folder / "tokenizer"), model_type="bpe", byte_fallback=True, unk_id=0, bos_id=1, eos_id=2,
        character_coverage=0.99, minloglevel=2, normalization_rule_name="identity", remove_extra_whitespaces=False)
    (folder / "tokenizer.vocab").unlink()
    return folder


def tiny_llama2(folder):
    """Writes the pieces of `tiny_sentencepiece` as a tokenizer.json, as Llama 2's is made of its pieces."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tiny_sentencepiece(folder) / "tokenizer.model"))
    (folder / "tokenizer.model").unlink()
    ids = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    merges = [(piece[:cut], piece[cut:]) for piece in sorted(ids, key=lambda piece: -pieces.get_score(ids[piece]))
              if ids[piece] > 258 for cut in range(1, len(piece)) if {piece[:cut], piece[cut:]} <= set(ids)]
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder

# ----- models beside transformers ------------------------------------------------------------------------------------

TINY = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
CONFIGS = {
    "untied, llama3 scaling": {**TINY, "tie_word_embeddings": False, "rope_parameters": LLAMA3,
                               "max_position_embeddings": 131072},
    "tied": {**TINY, "tie_word_embeddings": True},
    "head_dim is not width / heads": {**TINY, "head_dim": 24, "num_key_value_heads": 4},
}
TEXTS = ["What causes chest pain?", "The patient is a 67-year-old man with fever, cough and confusion.",
         "1 + 1 =", "Metformin lowers glucose because", "甲状腺功能亢进的症状是什么?",
         "def bmi(weight, height):\n    return", "🙂 ok",
         "Name three causes of hyponatremia.", "Once upon a time", "List the cranial nerves in order:", "HbA1c 9.2 %",
         "A 24-year-old woman at 39 weeks of gestation", "Insulin resistance means", "## Thought\n\nOkay,",
         "Why is the sky blue?", "Wie viele Knochen hat der Mensch?", "Warfarin and vitamin K", "SELECT name FROM",
         "In summary, the treatment of anaphylaxis is", "Dr. Smith said: \"Take two tablets"]


def tiny_pair(name, folder, seed=0):
    """(transformers' model, ours) with the same random weights, in fp32; its folder."""
    import transformers
    torch.manual_seed(seed)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIGS[name])).eval()
    theirs.save_pretrained(folder)
    return theirs, M.load_model(folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def real_pair(smollm2):
    """(transformers' SmolLM2, ours, the tokenizer), in fp32."""
    import transformers
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    return theirs, M.load_model(smollm2, dtype=torch.float32), Tokenizer.from_dir(smollm2)


def reference_filter(logits, temperature, top_p, top_k, min_p):
    """transformers' own warpers, in its order, as probabilities."""
    from transformers.generation import logits_process as L
    scores = logits[None].double()
    warpers = [L.TemperatureLogitsWarper(temperature)]
    warpers += [L.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [L.TopPLogitsWarper(top_p)] if top_p < 1 else []
    for warper in warpers:
        scores = warper(None, scores)
    if min_p:
        p = scores.softmax(-1)
        scores = scores.masked_fill(p < min_p * p.max(), -math.inf)
    return scores.softmax(-1)[0]

# ----- a model to adapt and put back ---------------------------------------------------------------------------------

ADAPTED_CONFIG = replace(CONFIG, vocab_size=97, num_hidden_layers=3, max_position_embeddings=256,
                         tie_word_embeddings=True)


def tiny(dtype=torch.bfloat16, seed=0, tied=True):
    return M.Llama(replace(ADAPTED_CONFIG, tie_word_embeddings=tied)).to(dtype).init_weights(seed).eval()


def tiny_examples(n=2, length=24):
    """[(ids, labels), …] for test-time training, the first of each not trained."""
    rng = random.Random(1)
    examples = []
    for _ in range(n):
        ids = [rng.randrange(97) for _ in range(length)]
        examples.append((ids[:-1], [-100] * 6 + ids[7:]))
    return examples


def bits(model):
    """A copy of the bytes of every parameter."""
    return [parameter.detach().clone().view(torch.uint8) for parameter in model.parameters()]


def same(model, before):
    """Whether the model's `bits` are those of `before`."""
    return all(torch.equal(now, then) for now, then in zip(bits(model), before))


@contextlib.contextmanager
def held_elsewhere(path):
    """Another process that has `path` for itself (files.hold); it ends with the block."""
    code = f"import files, time; files.hold({str(path)!r}); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()

# ----- a teacher that is a function ----------------------------------------------------------------------------------


class Killed(Exception):
    """Ends a run as SIGKILL does: the replies in flight are lost."""


class MemoryStore(dict):
    def put(self, *replies):
        self.update({reply.key: reply for reply in replies})

    def close(self):
        """It outlives a command, as a file does."""


class FakeTeacher:
    """Answers each call by `answer(call)`: a text, a dict as JSON, an Exception as a failure, (thought, text), or a
    finished Reply's fields. It has three calls in flight, whose replies come in another order than they were asked."""

    def __init__(self, store, answer, model="fake", lives=None):
        self.store, self.answer, self.model, self.lives, self.asked = store, answer, model, lives, []

    def reply(self, call):
        key, said = key_of(self.model, call), self.answer(call)
        thought, said = said if isinstance(said, tuple) else (None, said)
        failure = str(said) if isinstance(said, Exception) else None
        text = None if failure else json.dumps(said) if isinstance(said, dict) else said
        return Reply(key=key, text=text, thought=thought, value=said if isinstance(said, dict) else None,
                     finish_reason="stop", usage={"prompt_tokens": 10, "completion_tokens": 3}, repaired=False,
                     failure=failure)

    def ask(self, calls):
        rng, flying, calls = random.Random(0), [], enumerate(calls)
        while True:
            while len(flying) < 3 and (one := next(calls, None)):
                flying.append(one)
                self.asked.append(key_of(self.model, one[1]))
            if not flying:
                return
            if self.lives == 0:
                raise Killed
            self.lives = self.lives and self.lives - 1
            i, call = flying.pop(rng.randrange(len(flying)))
            reply = self.reply(call)
            if not reply.failure:
                self.store.put(reply)
            yield i, reply

    def close(self):
        """Nothing is open."""

# ----- a server that is a script --------------------------------------------------------------------------------------


def completion(text, finish="stop", **message):
    return {"id": "1", "object": "chat.completion", "model": "m", "usage": {"prompt_tokens": 3, "completion_tokens": 5},
            "choices": [{"index": 0, "finish_reason": finish, "message": {"content": text, **message}}]}


class Scripted:
    """A server whose `script(request, writer)` gives (status, headers, JSON or bytes), or None if it wrote itself."""

    def __init__(self):
        self.requests, self.headers, self.now, self.most = [], [], 0, 0
        self.loop, ready, self.port = asyncio.new_event_loop(), threading.Event(), 0
        self.script = self.echo

        def run():
            asyncio.set_event_loop(self.loop)
            self.loop.create_task(self.listen()).add_done_callback(lambda task: ready.set())
            self.loop.run_forever()
        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        ready.wait()
        self.url = f"http://127.0.0.1:{self.port}/v1"

    async def listen(self):
        self.listening = await asyncio.start_server(self.serve, "127.0.0.1", self.port)
        self.port = self.listening.sockets[0].getsockname()[1]

    @staticmethod
    async def echo(request, writer):
        return 200, {}, completion("to " + request["messages"][-1]["content"])

    async def serve(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while line := await reader.readline():
                fields = {}
                while (field := await reader.readline()).strip():
                    name, _, value = field.decode().partition(":")
                    fields[name.lower()] = value.strip()
                body = await reader.readexactly(int(fields.get("content-length", 0)))
                request = json.loads(body) if body else line.decode().split()[1]
                self.requests.append(request)
                self.headers.append(fields)
                self.now += 1
                self.most = max(self.most, self.now)
                try:
                    found = await self.script(request, writer)
                finally:
                    self.now -= 1
                if found is None:
                    break
                self.send(writer, *found)
                await writer.drain()
        writer.close()

    @staticmethod
    def send(writer, status, headers, body):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", "content-length": len(body), **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {status} x\r\n{head}\r\n".encode() + body)

    def close(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    def asked(self):
        return [request["messages"][-1]["content"] for request in self.requests]
