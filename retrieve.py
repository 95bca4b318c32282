"""Finding the solved problem most like a question: an index of questions as vectors, and the search in it.

    score(query, question) = inner product of their vectors: the cosine, or the dot product of a model made for it
    neighbours of a query = the k records of largest score, no two of them the same question and conversation

FineMedLM-o1 (arXiv 2501.09213) trains at test time on the stored reasoning whose *question* is nearest to the one
asked: the question is embedded, the whole record stored. Upstream embedded queries together with a long shared prompt,
mean-pooled a CLS model and did not normalise; here encoder.py takes all this from the model's own files. The index
stores these settings, and a search embeds its query by them. FAISS: arXiv 2401.08281.

    python retrieve.py build --data data/traces.jsonl --encoder models/bge-large-en-v1.5 --out index/traces
    python retrieve.py search --index index/traces --k 3 "What causes urinary tract infections in children?"
    torchrun --nproc-per-node 8 retrieve.py build --data …      each rank encodes its share of the rows

Shapes: N texts, D width of a vector, Q queries, k neighbours.
"""
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import faiss
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from encoder import Encoder
from files import (
    InputError,
    Parser,
    hold,
    read_data,
    read_json,
    read_jsonl,
    require_dir,
    run_main,
    sha256,
    whole,
    written_aside,
)
from parallel import from_all, interleaved_on_rank_0, start, stop
from rows import messages_of, question_of, shorten, try_to
from tokenizer import check_unicode
from weights import write_safetensors

DEFAULT_ENCODER = "models/all-minilm-l6-v2"
DEFAULT_INDEX = "index/traces"
FORMAT = "finemedlm-index-1"
FAR, NEAR = 0.5, 0.25  # quantiles, see Index.thresholds
INDEX_FILES = {"manifest.json", "records.jsonl", "vectors.safetensors"}
# an older index does not state these settings of its encoder and was built with these values; nor does it state
# lower_case, which was followed
UNSAID = {"document_prompt": "", "similarity": "cosine", "normalize": True, "truncate_dim": None,
          "truncation_side": "right", "normalizer": None}


# ----- the index -----------------------------------------------------------------------------------------------------

class Index:
    """Questions as vectors, each with the record it came from: `records[id]` for the ids that `search` returns."""

    def __init__(self, vectors, records, manifest):
        self.vectors, self.records, self.manifest = vectors, records, manifest
        self.encoder_dir = manifest["encoder"]["directory"]
        self.faiss = build_faiss(vectors, manifest["factory"])

    @classmethod
    def build(cls, encoder, records, field="instruction", factory="Flat", sources=(), progress=False):
        """Embeds the question of every record (a dict); `sources` is copied into the manifest. The first of several
        records with the same question and conversation is kept. The manifest counts the others (`repeats`), and the
        records kept that have no answer to learn from (`unanswered`).

        Under torchrun every rank calls this with the same records and encodes its share; rank 0 gets the index, the
        others None. InputError for a record without a question, and for a factory string FAISS cannot build.
        """
        if not records:
            raise InputError("no records to index; expected at least one")
        given, (questions, records, answered) = len(records), zip(*distinct(records, field))
        empty = np.empty((0, encoder.dimension), dtype=np.float32)
        build_faiss(empty, factory)  # a wrong string fails now, not after the encoding
        vectors = encode_in_parallel(encoder, questions, progress)
        if vectors is None:
            return None
        described = {"directory": str(encoder.directory), "name": encoder.directory.resolve().name, **encoder.identity}
        manifest = {"format": FORMAT, "encoder": described, "field": field, "factory": factory, "count": len(records),
                    "repeats": given - len(records), "unanswered": answered.count(False),
                    "dimension": vectors.shape[1], "sources": list(sources)}
        return cls(vectors, list(records), manifest)

    def search(self, vectors, k):
        """float32 [Q, D] -> (scores float32 [Q, k], ids int64 [Q, k]), best first, with k at most the number of
        records. A factory other than Flat may find fewer: ids are −1 there."""
        width = self.vectors.shape[1]
        if np.ndim(vectors) != 2 or np.shape(vectors)[1] != width or k < 1:
            raise InputError(f"search: vectors {np.shape(vectors)}, k {k}; expected (Q, {width}), k from 1")
        return self.faiss.search(np.ascontiguousarray(vectors, dtype=np.float32), min(k, len(self.records)))

    def thresholds(self, sample=1000):
        """(far, near): how alike the index's questions are, of at most `sample`; to four places, as scores are told.

            far   what two of these score, in the median. A question whose nearest scores less lies outside of the index
            near  what three quarters of these score at least with their nearest of all. A question's nearest that
                  scores as much may hold the answer

        NaN, which no score is above or below, where there are no two, or none finds another.
        """
        ids = np.sort(np.random.default_rng(0).permutation(len(self.records))[:sample])
        drawn = self.vectors[ids]
        scores, found = self.search(drawn, 2)
        nobody = (found == ids[:, None]) | (found < 0)  # itself, and what another factory than Flat did not find
        others = np.where(nobody, -np.inf, scores).max(1)[~nobody.all(1)]  # equal records: the other may come first
        pairs = (drawn @ drawn.T)[np.triu_indices(len(ids), 1)]
        return tuple(round(float(np.quantile(values, share)), 4) if len(values) else math.nan
                     for values, share in ((pairs, FAR), (others, NEAR)))

    def save(self, directory):
        """Writes vectors.safetensors, records.jsonl and manifest.json aside, then renames: the old index or the new."""
        refuse_to_replace(directory)
        with written_aside(directory) as aside:
            aside.mkdir()
            write_safetensors({"vectors": torch.from_numpy(self.vectors)}, aside / "vectors.safetensors")
            with open(aside / "records.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in self.records)
            hashes = {name: sha256(aside / name) for name in ("vectors.safetensors", "records.jsonl")}
            manifest = self.manifest | {"files": hashes}
            manifest["sha256"] = manifest_sha256(manifest)
            text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
            (aside / "manifest.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory, encoder=None):
        """Reads an index that `save` wrote; an `encoder` passed in must be the one that built it. FAISS's own structure
        is built anew, never read. InputError for a missing, damaged or edited file."""
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
        squares = np.einsum("nd,nd->n", vectors, vectors)  # squared lengths
        cosine = says(manifest, "similarity") == "cosine"
        sound = np.abs(squares - 1) < 1e-3 if cosine else np.isfinite(squares)  # NaN is neither
        if not np.all(sound):
            expected = "of length 1" if cosine else "finite"
            raise InputError(f"{directory}/vectors.safetensors: vectors not {expected}; expected those of `build`")
        if bad := [row for row in records if isinstance(row, InputError)]:
            raise bad[0]
        index = cls(vectors, records, manifest)
        if encoder is not None:
            index.check_encoder(encoder)
        return index

    def load_encoder(self, directory=None, device="auto"):
        """The encoder of this index, from `directory` or where it was at build time, with the index's own instruction
        in front of queries. InputError unless it gives the vectors this index was built from."""
        stated = self.manifest["encoder"]  # without document_prompt, it is from before folders' prompts were read
        instruction = stated["query_instruction"] if "document_prompt" in stated else None
        encoder = Encoder.from_dir(directory or self.encoder_dir, device, query_instruction=instruction)
        self.check_encoder(encoder)
        return encoder

    def check_encoder(self, encoder):
        """InputError unless `encoder` gives the vectors this index was built from."""
        for key, found in encoder.identity.items():
            if (expected := says(self.manifest, key, found)) != found:
                raise InputError(f"{encoder.directory}: {key} is {found!r}; the index was built with {expected!r}: "
                                 "build it again, or name its encoder")


def says(manifest, key, otherwise=None):
    """A setting of the encoder that built an index, from the index's manifest or else UNSAID."""
    return manifest["encoder"].get(key, UNSAID.get(key, otherwise))


def distinct(records, field):
    """[(question, record, whether it has an answer), …], without repeats of an earlier question and conversation.

    A step of test-time training on either is the same step. Other columns, such as an id, may differ. A question
    without an answer can be searched, but not trained on.
    """
    kept = {}
    for record in records:
        question, (fault, messages) = question_of(record, field), try_to(messages_of, record, "")
        text = json.dumps([question, record if fault else messages], sort_keys=True)
        kept.setdefault(hashlib.blake2b(text.encode(), digest_size=16).digest(), (question, record, not fault))
    return list(kept.values())


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
    """The SHA-256 of a manifest without its own "sha256"."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def encode_in_parallel(encoder, texts, progress=False):
    """encoder.encode(texts), shared among torchrun's ranks: rank r takes texts r, r + world, r + 2 world, … Rank 0 gets
    float32 [N, D], the others None."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return encoder.encode(texts, progress=progress)
    world, error = start("cpu"), None  # vectors are gathered in main memory, wherever the encoder runs
    try:
        share = encoder.encode(texts[world.rank::world.size], progress=progress and world.rank == 0)
    except InputError as found:
        error = found
    from_all(world, error)  # raises it on every rank, because none may wait for another
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
    if int(os.environ.get("RANK", 0)) == 0:
        hold(args.out)
    records, sources, bad = read_records(args.data, args.field, args.on_bad_row)
    encoder = Encoder.from_dir(args.encoder, args.device, query_instruction=args.query_instruction,
                               batch_tokens=args.batch_tokens)
    index = Index.build(encoder, records, args.field, args.factory, sources, progress=True)
    if index is not None:  # rank 0
        index.save(args.out)
        if bad:
            print(f"warning: left out {bad} bad rows (no question, or no JSON)", file=sys.stderr)
        if repeats := index.manifest["repeats"]:
            print(f"left out {repeats} records that repeat an earlier question and conversation", file=sys.stderr)
        if unanswered := index.manifest["unanswered"]:
            print(f"warning: {unanswered} records have no answer to learn from; ttt.py will pass over them",
                  file=sys.stderr)
        print(f"{args.out}: {len(index.records)} records, {index.vectors.shape[1]} dimensions, {args.factory}")


def search_command(args):
    if not args.query.strip():
        raise InputError("the query is empty; expected a question")
    index = Index.load(args.index)
    encoder = index.load_encoder(args.encoder, args.device)
    scores, ids = index.search(encoder.encode([args.query], is_query=True), args.k)
    found = [(score, i) for score, i in zip(scores[0].tolist(), ids[0].tolist()) if i >= 0]
    if args.json:
        results = [{"score": score, "id": i, "record": index.records[i]} for score, i in found]
        print(json.dumps({"query": args.query, "results": results}, ensure_ascii=False))
        return
    for score, i in found:
        print(f"{score:.4f} {i:>7}  {shorten(question_of(index.records[i], index.manifest['field']), 160)}")


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
    build.add_argument("--query-instruction", metavar="TEXT", help="text in front of queries; the index keeps it for "
                       "its searches (default: as the encoder's files say; bge-*-en where they say nothing: its own)")
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
