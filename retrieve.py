"""Finding the solved problem most like a question: a BERT encoder by hand, and an index of questions.

    x [M, D] = norm(word + position + type)          the tokens of a batch of texts end to end, without padding
    for each layer:   x = norm(x + attention(x));   x = norm(x + down(gelu(up(x))))
    vector of a text = x at [CLS] (bge) or its mean over the text (MiniLM), scaled to length 1
    score(query, question) = inner product of their vectors, the cosine

FineMedLM-o1 (arXiv 2501.09213) trains at test time on the stored reasoning whose *question* is nearest to the one
asked: the question is embedded, the whole record stored. Upstream embedded queries together with a long shared prompt,
mean-pooled a CLS model and did not normalise; here pooling and lengths come from the model's own files.
BERT: arXiv 1810.04805. Sentence vectors: arXiv 1908.10084. bge: arXiv 2309.07597. FAISS: arXiv 2401.08281.

    python retrieve.py build --data data/traces.jsonl --encoder models/bge-large-en-v1.5 --out index/traces
    python retrieve.py search --index index/traces --k 3 "What causes urinary tract infections in children?"
    torchrun --nproc-per-node 8 retrieve.py build --data …      each rank encodes its share of the rows

Shapes: N texts, M tokens of a batch, D width, H heads, C channels of a head, Q queries, k neighbours.
"""
import os

# OpenMP's threads wait briefly, so that other processes run; read when torch is loaded (bench/neighbour.py)
os.environ.update({} if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & {*os.environ} else {"GOMP_SPINCOUNT": "1000"})
import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import groupby
from pathlib import Path

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer, normalizers
from torch import nn
from tqdm import tqdm

from data import check_unicode
from files import (
    InputError,
    Parser,
    read_data,
    read_json,
    read_jsonl,
    require_dir,
    run_main,
    sha256,
    whole,
    written_aside,
)
from parallel import from_all, interleaved_on_rank_0, pick_device, start, stop
from rows import question_of

DEFAULT_ENCODER = "models/all-minilm-l6-v2"
DEFAULT_INDEX = "index/traces"
BGE_QUERY_INSTRUCTION = "Represent this sentence for searching relevant passages: "  # the model cards of bge-*-en-v1.5
FORMAT = "finemedlm-index-1"
INDEX_FILES = {"manifest.json", "records.jsonl", "vectors.safetensors"}


# ----- the BERT encoder ----------------------------------------------------------------------------------------------

def read_bert_config(path):
    """The sizes in a Hugging Face config.json, as a dict. InputError for anything but the BERT that is built here."""
    raw = read_json(path)
    for key, expected in {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute",
                          "is_decoder": False, "quantization_config": None}.items():
        if raw.get(key, None if key == "model_type" else expected) != expected:
            raise InputError(f"{path}: {key} is {raw.get(key)!r}; expected {expected!r}, as in bge-*-en-v1.5, MiniLM")
    config = {"layer_norm_eps": raw.get("layer_norm_eps", 1e-12), "name": str(raw.get("_name_or_path"))}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "max_position_embeddings", "type_vocab_size"):
        config[key] = raw.get(key)
        if type(config[key]) is not int or config[key] < 1:
            raise InputError(f"{path}: {key} is {config[key]!r}; expected a positive whole number")
    if not isinstance(config["layer_norm_eps"], float) or config["hidden_size"] % config["num_attention_heads"]:
        raise InputError(f"{path}: layer_norm_eps {config['layer_norm_eps']!r}, hidden_size {config['hidden_size']}; "
                         f"expected a decimal number and a multiple of num_attention_heads")
    return config


def by_length(rows, groups):
    """Cuts rows [M, …] into one view [count, length, …] per group: `count` texts of equal `length`, side by side."""
    parts = rows.split([count * length for count, length in groups])
    return [part.view(count, length, -1) for part, (count, length) in zip(parts, groups)]


def self_attention(qkv, groups, n_heads):
    """Every token attends to every token of its own text. qkv [M, 3D] -> [M, D]. Texts of equal length go together,
    so nothing is padded and nothing masked."""
    attended = []
    for part in by_length(qkv, groups):
        q, k, v = part.unflatten(2, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)  # each [count, H, length, C]
        attended.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1))
    return torch.cat(attended)


def affine(x, layer, gelu=False, plus=None):
    """layer(x) for x [M, in], then the exact GELU (with erf) or the sum with `plus` [M, out].

    On a CPU in fp32 it calls oneDNN by name, which does either in the same pass; torch itself gives fp32 products to
    MKL, which reaches less than half of oneDNN's speed on AMD processors (110 against 250 GFLOP/s a core).
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        product = torch.ops.mkldnn._linear_pointwise
        if plus is not None:
            return product.binary(x, plus, layer.weight, layer.bias, "add")
        return product(x, layer.weight, layer.bias, "gelu" if gelu else "none", [], "none")
    y = layer(x)
    return F.gelu(y) if gelu else y if plus is None else y.add_(plus)


class Layer(nn.Module):
    """One BERT layer: each half adds to its input and is normalised afterwards (post-norm)."""

    def __init__(self, config):
        super().__init__()
        width, inner, eps = config["hidden_size"], config["intermediate_size"], config["layer_norm_eps"]
        self.n_heads = config["num_attention_heads"]
        self.qkv = nn.Linear(width, 3 * width)  # one large product is faster than three
        self.out = nn.Linear(width, width)
        self.out_norm = nn.LayerNorm(width, eps)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.down_norm = nn.LayerNorm(width, eps)

    def forward(self, x, groups):  # x [M, D]
        x = self.out_norm(affine(self_attention(affine(x, self.qkv), groups, self.n_heads), self.out, plus=x))
        return self.down_norm(affine(affine(x, self.up, gelu=True), self.down, plus=x))


class Bert(nn.Module):
    """The whole encoder, as far as sentence vectors need it: no pooler, no heads, no dropout."""

    def __init__(self, config):
        super().__init__()
        width = config["hidden_size"]
        self.word = nn.Embedding(config["vocab_size"], width)
        self.position = nn.Embedding(config["max_position_embeddings"], width)
        self.token_type = nn.Embedding(config["type_vocab_size"], width)
        self.norm = nn.LayerNorm(width, config["layer_norm_eps"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))

    @torch.inference_mode()
    def forward(self, texts, pooling):
        """texts: arrays of token ids, equal lengths side by side -> [len(texts), D] float32, rows of length 1."""
        groups = [(len(list(same)), length) for length, same in groupby(map(len, texts))]
        ids = torch.from_numpy(np.concatenate(texts)).to(self.word.weight.device)
        positions = torch.cat([torch.arange(len(text)) for text in texts]).to(ids.device)
        x = self.norm(self.word(ids) + self.position(positions) + self.token_type.weight[0])
        for layer in self.layers:
            x = layer(x, groups)
        pooled = [part[:, 0] if pooling == "cls" else part.mean(1) for part in by_length(x.float(), groups)]
        return F.normalize(torch.cat(pooled), dim=1)


TENSORS = {  # our names -> Hugging Face's; those of a layer get the prefix encoder.layer.N.
    "word": ["embeddings.word_embeddings"], "position": ["embeddings.position_embeddings"],
    "token_type": ["embeddings.token_type_embeddings"], "norm": ["embeddings.LayerNorm"],
    "qkv": ["attention.self.query", "attention.self.key", "attention.self.value"],
    "out": ["attention.output.dense"], "out_norm": ["attention.output.LayerNorm"],
    "up": ["intermediate.dense"], "down": ["output.dense"], "down_norm": ["output.LayerNorm"]}
NOT_USED = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}  # for next-sentence prediction


def load_bert(config, path):
    """The encoder with the weights of the safetensors file `path`, names with or without "bert.", as float32.
    InputError for a damaged file, and for missing, unknown or misshapen tensors: the first five of them by name."""
    with torch.device("meta"):
        model = Bert(config)
    sources, expected = {}, {}
    for name, parameter in model.named_parameters():
        *layer, part, kind = name.split(".")
        prefix = f"encoder.layer.{layer[1]}." if layer else ""
        sources[name] = [f"{prefix}{source}.{kind}" for source in TENSORS[part]]
        rows = parameter.shape[0] // len(sources[name])
        expected |= {source: [rows, *parameter.shape[1:]] for source in sources[name]}
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name.removeprefix("bert."): name for name in file.keys()}  # noqa: SIM118, not a dict
            found = {name: file.get_slice(stored[name]).get_shape() for name in stored if name not in NOT_USED}
            wrong = [f"{name} is {found.get(name, 'missing')} (expected {expected.get(name, 'no such tensor')})"
                     for name in {**expected, **found} if found.get(name) != expected.get(name)]
            if wrong:
                raise InputError(f"{path}: {len(wrong)} tensors do not fit its config.json: {'; '.join(wrong[:5])}")
            weights = {name: torch.cat([file.get_tensor(stored[source]).float() for source in parts])
                       for name, parts in sources.items()}  # cat copies out of the mapped file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


# ----- texts in, vectors out -----------------------------------------------------------------------------------------

class Encoder:
    """A sentence-transformers folder of a BERT model: `Encoder.from_dir(directory).encode(texts)`."""

    @classmethod
    def from_dir(cls, directory, device="cpu", dtype=torch.float32, query_instruction=None, batch_tokens=None):
        """Reads config.json, modules.json and the pooling's, sentence_bert_config.json, tokenizer.json and
        model.safetensors. InputError for whatever is not a BERT with CLS or mean pooling.

        query_instruction: text in front of queries, never of what is indexed; None: a sentence for bge-*-en, else none.
        batch_tokens: None: 1,024 on a CPU, where a batch should stay in the cache, 16,384 on a GPU.
        """
        self, directory = cls(), require_dir(directory, "an encoder")
        config = read_bert_config(directory / "config.json")
        path = directory / "sentence_bert_config.json"
        settings = read_json(path) if path.exists() else {}
        length = settings.get("max_seq_length") or config["max_position_embeddings"]
        if type(length) is not int or length < 3:
            raise InputError(f"{path}: max_seq_length is {length!r}; expected a whole number from 3")
        if query_instruction is None:
            name = f"{directory.resolve().name} {config['name']}".lower()
            query_instruction = BGE_QUERY_INSTRUCTION if "bge-" in name and "-en" in name else ""
        if device in ("auto", "cpu", "cuda"):
            device = pick_device(device)
        self.directory, self.device, self.query_instruction = directory, torch.device(device), query_instruction
        self.batch_tokens = batch_tokens or (1024 if self.device.type == "cpu" else 16384)
        self.max_tokens = min(length, config["max_position_embeddings"])
        self.pooling = read_pooling(directory)
        self.tokenizer = read_tokenizer(directory / "tokenizer.json", config["vocab_size"],
                                        settings.get("do_lower_case"))
        self.model = load_bert(config, directory / "model.safetensors").to(self.device, dtype)
        return self

    @cached_property
    def identity(self):
        """All that decides the vectors, as a dict: stored with an index, and compared when the index is used."""
        return {"model_sha256": sha256(self.directory / "model.safetensors"),
                "tokenizer_sha256": sha256(self.directory / "tokenizer.json"),
                "config_sha256": sha256(self.directory / "config.json"),
                "pooling": self.pooling, "max_tokens": self.max_tokens, "query_instruction": self.query_instruction}

    def token_ids(self, texts):
        """One int64 array [CLS] … [SEP] per text, at most max_tokens long. "[SEP]" typed in a text is plain text."""
        for text in texts:
            check_unicode(text)
        start, end = self.tokenizer.token_to_id("[CLS]"), self.tokenizer.token_to_id("[SEP]")
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([start, *encoding.ids[:self.max_tokens - 2], end]) for encoding in encodings]

    def encode(self, texts, is_query=False, progress=False):
        """list of str -> float32 [N, D], rows of length 1; a text's vector does not depend on its company (to 1e-6).

        InputError for a text that is not Unicode, and for weights that give NaN.
        """
        vectors = np.empty((len(texts), self.model.norm.bias.numel()), dtype=np.float32)
        prefix = self.query_instruction if is_query else ""
        with tqdm(total=len(texts), unit="text", delay=2, disable=not (progress and sys.stderr.isatty())) as bar:
            for first in range(0, len(texts), 8192):  # so that the ids of a large corpus need not all be in memory
                ids = self.token_ids([prefix + text for text in texts[first:first + 8192]])

                def encode_batch(rows, ids=ids, first=first):
                    batch = self.model([ids[row] for row in rows], self.pooling)
                    vectors[np.add(rows, first)] = batch.cpu().numpy()
                    return len(rows)
                batches = plan_batches([len(row) for row in ids], self.batch_tokens)
                on_device = on_all_threads if self.device.type == "cpu" else map
                for done in on_device(encode_batch, batches):
                    bar.update(done)
        if not np.isfinite(vectors).all():
            raise InputError(f"{self.directory}/model.safetensors: its vectors are not finite; expected sound weights")
        return vectors


def plan_batches(lengths, batch_tokens):
    """Lists of row numbers, longest rows first, each list of at most `batch_tokens` tokens (or one longer row)."""
    batches, used = [], batch_tokens
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if used + lengths[row] > batch_tokens:
            batches.append([])
            used = 0
        batches[-1].append(row)
        used += lengths[row]
    return batches


def on_all_threads(work, items):
    """Yields work(item) for every item, several at once, each on its share of torch's threads.

    Threads that share a batch wait for each other after every operation; with a batch each they do not (measured on
    two cores: 1.3 times as many texts a second, and more while others use the machine).
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(items))
    if workers < 2:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,))
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # new threads start with the last setting


def read_pooling(directory):
    """"cls" or "mean", from modules.json and the pooling's config.json in its old or new form; else InputError."""
    path = directory / "modules.json"
    modules = {str(module.get("type")).rpartition(".")[2]: module.get("path")
               for module in read_json(path, expect=list) if isinstance(module, dict)}
    folder = str(modules.get("Pooling"))
    if set(modules) - {"Normalize"} != {"Transformer", "Pooling"} or modules["Transformer"] != "" \
            or Path(folder).name != folder:
        raise InputError(f"{path}: found {modules}; expected a Transformer in '', a Pooling in a folder, and Normalize")
    path = directory / folder / "config.json"
    raw = read_json(path)
    modes = [key for key, on in raw.items() if key.startswith("pooling_mode_") and on] or [raw.get("pooling_mode")]
    names = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "cls": "cls", "mean": "mean"}
    if len(modes) != 1 or modes[0] not in names or raw.get("include_prompt", True) is not True:
        raise InputError(f"{path}: pools by {modes}, include_prompt {raw.get('include_prompt', True)}; "
                         "expected either CLS or mean, over all tokens")
    return names[modes[0]]


def read_tokenizer(path, vocab_size, lower_case):
    """The tokenizer without its stored padding and truncation; control tokens typed in a text stay text."""
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
    except OSError:
        raise
    except BaseException as error:  # the Rust library can panic, and its panic is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise InputError(f"{path}: not a readable tokenizer ({error})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    if lower_case:
        rest = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *rest])
    vocabulary = tokenizer.get_vocab()
    if "[CLS]" not in vocabulary or "[SEP]" not in vocabulary or max(vocabulary.values()) >= vocab_size:
        raise InputError(f"{path}: {len(vocabulary)} tokens; expected [CLS], [SEP], ids below vocab_size {vocab_size}")
    return tokenizer


# ----- the index -----------------------------------------------------------------------------------------------------

class Index:
    """Questions as vectors, each with the record it came from: `records[id]` for the ids that `search` returns."""

    def __init__(self, vectors, records, manifest):
        self.vectors, self.records, self.manifest = vectors, records, manifest
        self.encoder_dir = manifest["encoder"]["directory"]
        self.faiss = build_faiss(vectors, manifest["factory"])

    @classmethod
    def build(cls, encoder, records, field="instruction", factory="Flat", sources=(), progress=False):
        """Embeds the question of every record (a dict); `sources` goes into the manifest as it is.

        Under torchrun every rank calls this with the same records and encodes its share; rank 0 gets the index, the
        others None. InputError for a record without a question, and for a factory string FAISS cannot build.
        """
        if not records:
            raise InputError("no records to index; expected at least one")
        width = encoder.model.norm.bias.numel()
        build_faiss(np.empty((0, width), dtype=np.float32), factory)  # a wrong string fails now, not after the encoding
        vectors = encode_in_parallel(encoder, [question_of(record, field) for record in records], progress)
        if vectors is None:
            return None
        described = {"directory": str(encoder.directory), "name": encoder.directory.resolve().name, **encoder.identity}
        return cls(vectors, records, {"format": FORMAT, "encoder": described, "field": field, "factory": factory,
                                      "count": len(records), "dimension": vectors.shape[1], "sources": list(sources)})

    def search(self, vectors, k):
        """float32 [Q, D] -> (scores float32 [Q, k], ids int64 [Q, k]), best first, with k at most the number of
        records. A factory other than Flat may find fewer: ids are −1 there."""
        width = self.vectors.shape[1]
        if np.ndim(vectors) != 2 or np.shape(vectors)[1] != width or k < 1:
            raise InputError(f"search: vectors {np.shape(vectors)}, k {k}; expected (Q, {width}), k from 1")
        return self.faiss.search(np.ascontiguousarray(vectors, dtype=np.float32), min(k, len(self.records)))

    def save(self, directory):
        """Writes vectors.safetensors, records.jsonl and manifest.json aside, then renames: the old index or the new."""
        refuse_to_replace(directory)
        with written_aside(directory) as aside:
            aside.mkdir()
            save_file({"vectors": self.vectors}, aside / "vectors.safetensors")
            with open(aside / "records.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in self.records)
            hashes = {name: sha256(aside / name) for name in ("vectors.safetensors", "records.jsonl")}
            manifest = self.manifest | {"files": hashes}
            manifest["sha256"] = manifest_sha256(manifest)
            text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
            (aside / "manifest.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory, encoder=None):
        """Reads what `save` wrote; FAISS's own structure is built anew, never read. With an `encoder`, it must be the
        one the index was built with. InputError for a missing, damaged or edited file."""
        directory = require_dir(directory, "an index")
        manifest = read_json(directory / "manifest.json")
        if manifest.get("format") != FORMAT or manifest.get("sha256") != manifest_sha256(manifest):
            raise InputError(f"{directory}/manifest.json: not {FORMAT} with the SHA-256 it states; expected it as "
                             "`build` wrote it")
        for name in ("vectors.safetensors", "records.jsonl"):
            expected = manifest["files"][name]
            if (found := sha256(directory / name)) != expected:
                raise InputError(f"{directory / name}: damaged: SHA-256 is {found[:12]}…, expected {expected[:12]}…")
        try:
            with safe_open(directory / "vectors.safetensors", framework="numpy") as file:
                vectors = np.array(file.get_tensor("vectors"))
        except SafetensorError as error:
            raise InputError(f"{directory}/vectors.safetensors: not readable ({error})") from None
        records = [row for _, row in read_jsonl(directory / "records.jsonl")]
        shape = (manifest["count"], manifest["dimension"])
        if vectors.shape != shape or vectors.dtype != np.float32 or len(records) != shape[0]:
            raise InputError(f"{directory}: {vectors.dtype} vectors {vectors.shape} and {len(records)} records; "
                             f"expected float32 {shape} and {shape[0]}, as in manifest.json")
        if not np.all(np.abs(np.einsum("nd,nd->n", vectors, vectors) - 1) < 1e-3):  # NaN fails this too
            raise InputError(f"{directory}/vectors.safetensors: vectors not of length 1; expected those of `build`")
        if bad := [row for row in records if isinstance(row, InputError)]:
            raise bad[0]
        index = cls(vectors, records, manifest)
        if encoder is not None:
            index.check_encoder(encoder)
        return index

    def check_encoder(self, encoder):
        """InputError unless `encoder` gives the vectors this index was built from."""
        for key, found in encoder.identity.items():
            if (expected := self.manifest["encoder"].get(key)) != found:
                raise InputError(f"{encoder.directory}: {key} is {found!r}; the index was built with {expected!r}")


def refuse_to_replace(directory):
    """InputError where something other than an index stands at `directory`: saving there would delete it."""
    directory = Path(directory)
    if directory.exists() and not (directory.is_dir() and {path.name for path in directory.iterdir()} <= INDEX_FILES):
        raise InputError(f"{directory}: exists and is no index; expected a new folder, or an index to replace")


def build_faiss(vectors, factory):
    """A FAISS index for the inner product over float32 [N, D]. `factory`: "Flat" is exact; "IVF1024,Flat" or "HNSW32"
    are faster on millions. Training is seeded, so the same vectors give the same index. InputError if FAISS refuses."""
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise RuntimeError("it does not rank by inner product")
        if len(vectors):
            index.train(vectors)
            index.add(vectors)
    except RuntimeError as error:
        reason = str(error).rpartition(": ")[2]
        raise InputError(f"--factory {factory!r}: FAISS cannot build it over {len(vectors)} vectors ({reason}); "
                         "expected a factory string such as Flat or IVF64,Flat") from None
    if (inverted := faiss.try_extract_index_ivf(index)) is not None:
        inverted.nprobe = max(1, round(inverted.nlist ** 0.5))  # FAISS looks into one cell only, which misses many
    return index


def manifest_sha256(manifest):
    """Of everything in the manifest but this hash itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def encode_in_parallel(encoder, texts, progress=False):
    """encoder.encode(texts), shared among torchrun's ranks: rank r takes texts r, r + world, r + 2 world, … Rank 0 gets
    float32 [N, D], the others None."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return encoder.encode(texts, progress=progress)
    world, share, error = start("cpu"), None, None  # vectors are gathered in main memory, wherever the encoder runs
    try:
        share = encoder.encode(texts[world.rank::world.size], progress=progress and world.rank == 0)
    except InputError as found:
        error = found
    errors = [error for error in from_all(world, error) if error]
    if errors:  # on every rank, because none may wait for another
        raise errors[0]
    vectors = interleaved_on_rank_0(world, torch.from_numpy(share), len(texts))
    stop(world)
    return None if vectors is None else vectors.numpy()


# ----- command line --------------------------------------------------------------------------------------------------

def problem_of(row, field, where):
    """Why a row of a data file cannot be indexed, as an InputError; None for a good one."""
    if isinstance(row, InputError):
        return row
    try:
        question_of(row, field)
        check_unicode(json.dumps(row, ensure_ascii=False))
    except InputError as error:
        return InputError(f"{where}: {error}")


def read_records(paths, field, on_bad_row="stop"):
    """The rows of data files that have a question -> (records, sources for the manifest, number of bad rows).
    InputError with its place for the first bad row, unless on_bad_row is "skip"."""
    records, sources, bad = [], [], 0
    for path in paths:
        before = len(records)
        for _, where, row in read_data(path):
            problem = problem_of(row, field, where)
            if problem is None:
                records.append(row)
            elif on_bad_row == "stop":
                raise problem
            else:
                bad += 1
        sources.append({"path": str(path), "sha256": sha256(path), "rows": len(records) - before})
    return records, sources, bad


def build_command(args):
    refuse_to_replace(args.out)
    records, sources, bad = read_records(args.data, args.field, args.on_bad_row)
    encoder = Encoder.from_dir(args.encoder, args.device, batch_tokens=args.batch_tokens)
    index = Index.build(encoder, records, args.field, args.factory, sources, progress=True)
    if index is not None:  # rank 0
        index.save(args.out)
        if bad:
            print(f"warning: left out {bad} bad rows (no question, or no JSON)", file=sys.stderr)
        print(f"{args.out}: {len(records)} records, {index.vectors.shape[1]} dimensions, {args.factory}")


def search_command(args):
    if not args.query.strip():
        raise InputError("the query is empty; expected a question")
    index = Index.load(args.index)
    encoder = Encoder.from_dir(args.encoder or index.encoder_dir, args.device)
    index.check_encoder(encoder)
    scores, ids = index.search(encoder.encode([args.query], is_query=True), args.k)
    found = [(score, i) for score, i in zip(scores[0].tolist(), ids[0].tolist()) if i >= 0]
    if args.json:
        results = [{"score": score, "id": i, "record": index.records[i]} for score, i in found]
        print(json.dumps({"query": args.query, "results": results}, ensure_ascii=False))
        return
    for score, i in found:
        question = " ".join(question_of(index.records[i], index.manifest["field"]).split())
        print(f"{score:.4f} {i:>7}  {''.join(char for char in question if char.isprintable()):.160}")


def main(argv=None):
    parser = Parser(description="Build and search an index of solved problems.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="embed the questions of data files and write an index")
    build.add_argument("--data", nargs="+", required=True, metavar="FILE",
                       help="rows as for training: .jsonl, .jsonl.gz, .json (an array) or .parquet")
    build.add_argument("--encoder", default=DEFAULT_ENCODER, metavar="DIR",
                       help="bge-*-en-v1.5 or MiniLM (default %(default)s; the authors': bge-large-en-v1.5)")
    build.add_argument("--out", default=DEFAULT_INDEX, metavar="DIR", help="the index to write (default %(default)s)")
    build.add_argument("--field", default="instruction", metavar="NAME", help="what is embedded: the text, or the "
                       "user's last message, under this key; instruction: the question of the row, wherever it "
                       "stands (default %(default)s)")
    build.add_argument("--factory", default="Flat", metavar="STRING", help="FAISS index: Flat is exact; IVF1024,Flat "
                       "or HNSW32 for millions of records (default %(default)s, the authors' choice)")
    build.add_argument("--batch-tokens", type=whole(1), metavar="N",
                       help="tokens of a batch (default 1024 on a CPU, as measured; 16384 on a GPU)")
    build.add_argument("--on-bad-row", choices=("stop", "skip"), default="stop",
                       help="what to do at a row without a question (default %(default)s)")
    search = commands.add_parser("search", help="print the records nearest to a question")
    search.add_argument("query", help="the question")
    search.add_argument("--index", default=DEFAULT_INDEX, metavar="DIR", help="what build wrote (default %(default)s)")
    search.add_argument("--k", type=whole(1), default=3, metavar="N",
                        help="how many records (default %(default)s; the authors train on 1, or on 1 of 3)")
    search.add_argument("--encoder", metavar="DIR", help="the index's encoder (default: where it was at build time)")
    search.add_argument("--json", action="store_true", help="print one JSON object: query, results (score, id, record)")
    for command in (build, search):
        command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                             help="where the encoder runs (default %(default)s: a GPU if there is one)")
    args = parser.parse_args(argv)
    (build_command if args.command == "build" else search_command)(args)


if __name__ == "__main__":
    run_main(main)
