"""evaluate.py on tiny models: its measures beside transformers, its runs beside themselves when cut off or divided."""
import argparse
import copy
import functools
import json
import math
import random
import re

import numpy as np
import pytest
import torch
from conftest import held_elsewhere, random_texts, tiny_sentencepiece, tiny_vocabulary, write_jsonl
from ranks import run_ranks

import arms as arms_module
import evaluate
import model as M
import retrieve
import ttt
from adapt import adapted
from arms import Evaluation, example_of, prompt_of
from benchmarks import read_benchmark
from files import InputError
from parallel import from_all
from tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTIONS = [{"question": f"{text}?", "options": dict(zip("ABCD", random_texts(4, seed=i))),
              "answer_idx": "ABCD"[i % 4]} for i, text in enumerate(random_texts(5, seed=9))]
ROWS = [{"instruction": f"What is {text}?", "response": f"It is {answer}.", "url": f"https://a.org/{i // 2}"}
        for i, (text, answer) in enumerate(zip(random_texts(6, seed=3), random_texts(6, seed=4)))]
ARMS = ("none", "nearest:k=2,lr=1e-3", "random:k=2,lr=1e-3", "context:k=2", "random-context:k=2",
        "nearest+context:k=2,lr=1e-3")


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer():
    """Each of these runs would read it anew, for most of its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "open_tokenizer", functools.cache(evaluate.open_tokenizer))
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny):
    """A folder with questions, rows and an index of twelve records."""
    folder = tmp_path_factory.mktemp("files")
    write_jsonl(folder / "medqa.jsonl", QUESTIONS)
    write_jsonl(folder / "rows.jsonl", ROWS)
    records = [{"instruction": f"Why {text}?", "response": " ".join(random_texts(3, seed=i))}
               for i, text in enumerate(random_texts(12, seed=5))]
    index = retrieve.Index.build(tiny, records)
    index.manifest["encoder"]["query_instruction"] = ""  # bge's own fills the 40 tokens of the tiny encoder
    index.save(folder / "index")
    return folder


SIX = ("--arms", *ARMS, "--batch-size", "2", "--cluster", "url", "--limit", "5")


def arguments(files, base, out, measure, *more):
    data = ["--benchmark", "sft", "--data", files / "rows.jsonl"] if measure == "bpb" else \
        ["--benchmark", "medqa", "--data", files / "medqa.jsonl"]
    index = ["--index", files / "index"] if re.search("nearest|random|context", " ".join(map(str, more))) else []
    return [*map(str, (*data, "--measure", measure, "--model", base, *index, "--out", out, "--device", "cpu", *more))]


def write_text(path, text):
    path.write_text(text)
    return path


def run(files, base, out, measure, *more):
    """{(question, arm): its row} of a run in this process."""
    evaluate.main(arguments(files, base, out, measure, *more))
    return {(row["number"], row["arm"]): row for row in map(json.loads, open(out / "results.jsonl"))}

# ----- measures ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(base):
    """(transformers' model in fp32, its tokenizer)."""
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(base)


def their_logp(theirs, prompt, answer):
    """Σ log p of the tokens of `answer` after `prompt`, one text a pass."""
    model, tokenizer = theirs
    start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    ids = torch.tensor([tokenizer(prompt + answer, add_special_tokens=False).input_ids])
    with torch.no_grad():
        logps = model(ids).logits[0].double().log_softmax(-1)
    return sum(logps[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1]))


def their_prompt(theirs, *turns):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return theirs[1].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("prompt", ["chat", "raw"])
@pytest.mark.parametrize("by", ["letter", "text"])
def test_log_likelihoods_are_those_of_transformers(files, base, theirs, tmp_path, monkeypatch, prompt, by):
    if prompt == "raw":  # a base model needs no chat template
        tokenizer, context = evaluate.open_tokenizer(base)
        plain = copy.copy(tokenizer)
        plain.template = None
        monkeypatch.setattr(evaluate, "open_tokenizer", lambda folder: (plain, context))
    rows = run(files, base, tmp_path / "run", "loglik", "--dtype", "fp32", "--prompt", prompt, "--by", by,
               "--batch-size", "3")
    for number, question in enumerate(QUESTIONS, 1):
        options = "\n".join(f"{letter}. {text}" for letter, text in question["options"].items())
        if prompt == "raw":
            asked, space = f"Question: {question['question']}\n{options}\nAnswer:", " "
        else:
            asked, space = their_prompt(theirs, f"{question['question']}\n\n{options}\n\nExactly one option is right. "
                                        f"Reply with its {by} and nothing else."), ""
        texts = [*question["options"]] if by == "letter" else [*question["options"].values()]
        expected = [their_logp(theirs, asked, space + text) for text in texts]
        row, right = rows[number, "none"], "ABCD".index(question["answer_idx"])
        assert row["logps"] == pytest.approx(expected, abs=1e-4)
        assert row["choice"] == "ABCD"[int(np.argmax(expected))] and row["correct"] == (row["choice"] == row["gold"])
        by_byte = [logp / len((space + text).encode()) for logp, text in zip(expected, texts)]
        assert row["choice_by_byte"] == "ABCD"[int(np.argmax(by_byte))]
        assert row["margin"] == pytest.approx(
            expected[right] - max(logp for i, logp in enumerate(expected) if i != right), abs=2e-4)
        assert row["p_gold"] == pytest.approx(math.exp(expected[right]) / sum(map(math.exp, expected)), rel=1e-3)


def test_bits_per_byte_and_the_records_in_the_prompt_are_those_of_transformers(files, base, theirs, tmp_path):
    rows = run(files, base, tmp_path / "run", "bpb", "--dtype", "fp32", "--cluster", "url", "--arms", "none",
               "context:k=1", "context:k=3")
    records = retrieve.Index.load(files / "index").records
    for number, row in enumerate(ROWS, 1):
        for arm, k in (("none", 0), ("context:k=1", 1), ("context:k=3", 3)):
            found = rows[number, arm]
            turns = [text for one in reversed(found.get("neighbours", [])) for text in
                     (records[one["id"]]["instruction"], records[one["id"]]["response"])]
            assert len(turns) == 2 * k
            logp = their_logp(theirs, their_prompt(theirs, *turns, row["instruction"]), row["response"])
            assert found["nats"] == pytest.approx(-logp, abs=1e-4) and found["bytes"] == len(row["response"].encode())
            assert found["bpb"] == pytest.approx(-logp / math.log(2) / found["bytes"], rel=1e-6)
            assert found["group"] == row["url"]


def test_a_reference_answer_is_cut_and_its_bytes_with_it(files, base, theirs, tmp_path):
    row = run(files, base, tmp_path / "run", "bpb", "--dtype", "fp32", "--answer-tokens", "3")[1, "none"]
    cut = theirs[1].decode(theirs[1](ROWS[0]["response"]).input_ids[:3]).rstrip("\ufffd").strip()
    assert cut == "It is" and row["tokens"] == 2 and row["bytes"] == 5  # the third token is a third of a character
    logp = their_logp(theirs, their_prompt(theirs, ROWS[0]["instruction"]), cut)
    assert row["nats"] == pytest.approx(-logp, abs=1e-4)


def test_white_space_around_an_answer_counts_for_nothing(files, base, tmp_path):
    write_jsonl(tmp_path / "spaced.jsonl", [ROWS[0] | {"response": f" {ROWS[0]['response']}\n "}])
    spaced, plain = (run(files, base, tmp_path / name, "bpb", "--limit", "1", "--data", data)[1, "none"]
                     for name, data in (("spaced", tmp_path / "spaced.jsonl"), ("plain", files / "rows.jsonl")))
    assert spaced == plain


@pytest.mark.parametrize("template", ["chatml", "llama3", "llama2"])
def test_the_tokens_that_are_scored_are_the_text_s_alone(files, tmp_path, template):
    """Neither the end of turn nor, in Llama 2's template, the space before it."""
    tokenizer = Tokenizer.from_dir(tiny_sentencepiece(tmp_path / "it") if template == "llama2" else
                                   tiny_vocabulary(tmp_path / "it", template))
    question = read_benchmark("medqa", files / "medqa.jsonl")[1]
    for by, expected in (("letter", [*question.options]), ("text", [*question.options.values()])):
        run = Evaluation(argparse.Namespace(measure="loglik", prompt="chat", by=by), None, tokenizer, 512, [], set())
        texts, ids = evaluate.answers_of(run, question)
        assert tokenizer.template == template and texts == expected == [tokenizer.decode(own) for own in ids]


def test_an_answer_without_a_whole_character_is_refused_before_the_model_is_loaded(files, base, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load", None)
    write_jsonl(tmp_path / "ill.jsonl", [ROWS[0] | {"response": "🤒"}])
    with pytest.raises(InputError, match=r"ill.jsonl:1: its answer has no whole character in 1 tokens"):
        run(files, base, tmp_path / "run", "bpb", "--data", tmp_path / "ill.jsonl", "--answer-tokens", "1")


def test_a_trained_arm_is_the_adapted_model_and_the_next_one_finds_the_old_weights(files, base, tmp_path, monkeypatch):
    """The steps are those of ttt.adapted on the same examples; `none`, measured last, is as alone."""
    seen = []

    def noted(run, messages, was_cut):
        seen.append(example_of(run, messages, was_cut))
        return seen[-1]
    monkeypatch.setattr(evaluate, "example_of", noted)
    arm = "nearest:k=2,lr=1e-3,steps=2,optimizer=sgd"
    rows = run(files, base, tmp_path / "run", "bpb", "--limit", "2", "--arms", arm, "none", "--seed", "5")
    alone = run(files, base, tmp_path / "alone", "bpb", "--limit", "2")
    model = M.load_model(base)
    for number in (1, 2):
        assert rows[number, "none"] == alone[number, "none"] and rows[number, arm]["applied"]
        examples = seen[2 * number - 2:2 * number]
        with adapted(model, examples, steps=2, lr=1e-3, optimizer="sgd", seed=5):
            again = M.Llama(model.config)
            again.load_state_dict(model.state_dict())
        assert rows[number, arm]["bpb"] != alone[number, "none"]["bpb"]
        M.save_model(again.to(torch.bfloat16), tmp_path / f"adapted{number}", source=base)
        expected = run(files, tmp_path / f"adapted{number}", tmp_path / f"run{number}", "bpb", "--limit", "2")
        assert rows[number, arm]["bpb"] == expected[number, "none"]["bpb"]


def test_the_arm_of_the_program_has_records_in_the_prompt_where_its_steps_help_or_one_is_near(
        files, base, tmp_path, monkeypatch):
    """Five records of random words do not help each other; with three, too few for a check, the steps are kept."""
    typical, checks = [], []

    def noted(model, examples, **settings):
        checks.append((len(examples), settings["check"]))
        return adapted(model, examples, **settings)
    monkeypatch.setattr(evaluate, "adapted", noted)
    monkeypatch.setattr(retrieve.Index, "thresholds", lambda self: (-1.0, typical[-1]))
    arms = ("none", "ttt:k=5,context=2,lr=1e-6", "ttt:k=3,context=2,lr=1e-3", "context:k=2",
            "nearest+context:k=3,context=2,lr=1e-3")
    for i, score in enumerate((9.0, -1.0)):
        typical.append(score), checks.clear()
        rows = run(files, base, tmp_path / str(i), "bpb", "--arms", *arms, "--limit", "2", "--dtype", "fp32")
        for number in (1, 2):
            none, undone, kept, context, both = (rows[number, arm]["nats"] for arm in arms)
            assert undone == pytest.approx(none if score == 9.0 else context, abs=1e-4) and none != context
            assert kept == both and not rows[number, arms[1]]["applied"] and rows[number, arms[2]]["applied"]
            assert rows[number, arms[1]]["reason"].startswith("the loss on the next 3 neighbours changed by")
            assert [rows[number, arm].get("in_prompt") for arm in arms] == [None, 2 * (score < 0), 2, None, None]
        assert checks == [(5, True)] * 2 + [(3, True)] * 2 + [(3, False)] * 2


def test_the_arm_of_the_program_does_nothing_where_the_model_is_sure(files, base, tmp_path, monkeypatch):
    """The model is asked with the question alone, before each question's steps; it stops where ttt.py would."""
    monkeypatch.setattr(evaluate, "stop_ids_of", lambda folder: {7})
    asked, answers = [], iter([0.29, 0.31])
    monkeypatch.setattr(retrieve.Index, "thresholds", lambda self: (-1.0, -1.0))
    monkeypatch.setattr(ttt, "greedy_nll", lambda model, ids, stop_ids: (
        asked.append((ids, stop_ids)) or (next(answers), 32)))
    prompts = []
    monkeypatch.setattr(evaluate, "prompt_of", lambda run, question, records=(): (
        prompts.append(prompt_of(run, question, records)) or prompts[-1]))
    arm = "random-ttt:k=3,context=2,lr=1e-3"
    rows = run(files, base, tmp_path / "run", "bpb", "--arms", "none", arm, "--limit", "2")
    none, ttt_1, none_2, ttt_2 = (rows[number, name] for number in (1, 2) for name in ("none", arm))
    assert ttt_1["bpb"] == none["bpb"] and ttt_1["reason"].startswith("the model is sure of its own answer: 0.29 nats")
    assert (ttt_1["applied"], ttt_1["in_prompt"]) == (False, 0) and (ttt_2["applied"], ttt_2["in_prompt"]) == (True, 2)
    assert ttt_2["bpb"] != none_2["bpb"] and [ids for ids, _ in asked] == prompts[:2]
    assert [stops for _, stops in asked] == [{7, Tokenizer.from_dir(base).end_of_turn()}] * 2


def test_the_arm_of_the_program_does_nothing_where_the_question_lies_outside(files, base, tmp_path, monkeypatch):
    """Outside by the nearest of the records that the arm may read; only an arm that asks is refused."""
    monkeypatch.setattr(retrieve.Index, "thresholds", lambda self: (far, 9.0))
    monkeypatch.setattr(ttt, "greedy_nll", lambda *_: (9.0, 32))
    arms = "none", "ttt:k=3,context=2,lr=1e-3", "nearest+context:k=3,context=2,lr=1e-3"
    for far in (2.0, -2.0):
        rows = run(files, base, tmp_path / str(far), "bpb", "--arms", *arms, "--limit", "1")
        none, asked, always = (rows[1, arm] for arm in arms)
        assert asked["bpb"] == (none if far > 0 else always)["bpb"] and none["bpb"] != always["bpb"]
        nearest = asked["neighbours"][0]["score"]
        assert asked["applied"] == (far < 0) and asked.get("reason") == (
            f"the index holds nothing like the question: its nearest scores {nearest:.3f}, expected 2.000"
            if far > 0 else None)


def test_an_arm_is_the_same_whatever_other_arms_stand_beside_it(files, base, tmp_path, monkeypatch):
    """More records in the prompt than are trained on are looked up; and only those in the prompt say whether one is
    near, not the further ones of another arm."""
    seen = []
    monkeypatch.setattr(evaluate, "reason_to_leave", lambda *_: None)
    monkeypatch.setattr(evaluate, "shows_neighbours", lambda report, nearest, near: seen.append(nearest))
    arms = "nearest+context:k=1,context=3,lr=1e-3", "random-ttt:k=5,context=2,lr=1e-9"
    flags = "--limit", "1", "--seed", "1", "--arms"
    beside = run(files, base, tmp_path / "beside", "bpb", *flags, *arms, "none", "random-context:k=8")
    for arm, wanted in zip(arms, (3, 5)):
        alone = run(files, base, tmp_path / str(wanted), "bpb", *flags, arm)[1, arm]
        assert len(alone["neighbours"]) == wanted  # and masked are counted over the records of all arms
        assert alone | {"masked": {}} == beside[1, arm] | {"masked": {}}
    scores = [neighbour["score"] for neighbour in beside[1, arms[1]]["neighbours"]]
    assert seen == [max(scores[:2])] * 2 and max(scores[:2]) < max(scores)
    assert beside[1, arms[1]]["in_prompt"] == 0 and beside[1, arms[1]]["nats"] == pytest.approx(
        beside[1, "none"]["nats"], abs=1e-4)


def test_generated_texts_do_not_depend_on_the_batch_and_are_read_strictly(files, base, tmp_path, monkeypatch):
    flags = ["--dtype", "fp32", "--max-new-tokens", "20", "--arms", "none", "context:k=1"]
    one, many = (run(files, base, tmp_path / size, "generate", *flags, "--batch-size", size) for size in ("1", "16"))
    assert one == many and all(row["truncated"] and row["tokens"] == 20 and not row["correct"] for row in one.values())
    said = ["## Thought\nThe answer is (B).\n## Summarization\nThe answer is (A).", "The answer is (B).", "?"] * 4

    def written(model, prompts, *, max_new_tokens, temperature, top_p, stop_ids, seed):
        assert (max_new_tokens, temperature, top_p, seed) == (30, 0.5, 0.8, 7)
        return [[*tokenizer.encode(said[i]), tokenizer.end_of_turn()] for i in range(len(prompts))]
    tokenizer = evaluate.open_tokenizer(base)[0]
    monkeypatch.setattr(evaluate, "generate_batch", written)
    found = run(files, base, tmp_path / "said", "generate", "--max-new-tokens", "30", "--temperature", "0.5", "--top-p",
                "0.8", "--seed", "7")
    assert [found[i, "none"]["choice"] for i in range(1, 6)] == ["A", "B", None, "A", "B"]
    assert found[1, "none"]["correct"] and found[2, "none"]["correct"] and not found[3, "none"]["correct"]
    assert found[1, "none"]["first"] == "B" and not found[1, "none"]["truncated"]
    assert found[1, "none"]["text"] == said[0]


def test_all_arms_may_write_as_much(files, base, tmp_path, monkeypatch):
    """Half of the window of 8,192 tokens, not what each arm's prompt leaves of it."""
    seen = []

    def written(model, prompts, *, max_new_tokens, **_):
        seen.append(max_new_tokens)
        return [[0] for _ in prompts]
    monkeypatch.setattr(evaluate, "generate_batch", written)
    run(files, base, tmp_path / "run", "generate", "--max-new-tokens", "6000", "--arms", "none", "context:k=1")
    assert seen == [4096, 4096]

# ----- runs ----------------------------------------------------------------------------------------------------------


def untimed(summary):
    """A summary without what differs from run to run."""
    for arm in summary["arms"].values():
        arm.pop("seconds"), arm.pop("memory_gb")
    return summary


@pytest.fixture(scope="module")
def whole(files, base, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(files, base, out, "bpb", *SIX)
    return out


def test_every_question_has_a_row_of_every_arm_and_the_arms_the_same_records(whole):
    rows = [json.loads(line) for line in open(whole / "results.jsonl")]  # noqa: SIM115
    assert [(row["number"], row["arm"]) for row in rows] == [(i, arm) for i in range(1, 6) for arm in ARMS]
    for i in range(5):
        none, nearest, random_, context, random_context, both = rows[6 * i:6 * i + 6]
        assert nearest["neighbours"] == context["neighbours"] == both["neighbours"] != random_["neighbours"]
        assert random_["neighbours"] == random_context["neighbours"] and "neighbours" not in none
        assert len({row["bpb"] for row in rows[6 * i:6 * i + 6]}) == 6
    summary = json.loads((whole / "summary.json").read_text())
    assert all(arm["seconds"] > 0 and arm["memory_gb"] > 0 for arm in summary["arms"].values())
    assert summary["comparisons"][0]["against"] == "context:k=2" and summary["comparisons"][0]["clusters"] == 3


def test_a_run_that_was_cut_off_anywhere_ends_in_the_same_file(files, base, whole, tmp_path, pytestconfig):
    expected, rng = (whole / "results.jsonl").read_bytes(), random.Random(0)
    out = tmp_path / "run"
    out.mkdir()
    for place in [0, *(rng.randrange(len(expected)) for _ in range(20 if pytestconfig.getoption("--heavy") else 2))]:
        (out / "config.json").write_bytes((whole / "config.json").read_bytes())
        (out / "results.jsonl").write_bytes(expected[:place])
        (out / "timings.jsonl").write_bytes((whole / "timings.jsonl").read_bytes())
        run(files, base, out, "bpb", *SIX)
        assert (out / "results.jsonl").read_bytes() == expected
    assert untimed(json.loads((out / "summary.json").read_text())) == untimed(
        json.loads((whole / "summary.json").read_text()))


def test_busy_cores_are_left_before_each_batch_and_taken_again_at_the_end(files, base, tmp_path, monkeypatch):
    """Else the runs of a ladder could lose threads and never get them back."""
    order = []

    class Watched(evaluate.Threads):
        def leave_busy_cores(self):
            order.append("threads")

        def close(self):
            order.append("closed")
    monkeypatch.setattr(evaluate, "Threads", Watched)
    run(files, base, tmp_path / "run", "bpb", "--limit", "3", "--batch-size", "2")
    assert order == ["threads", "threads", "closed"]


def test_a_finished_run_loads_nothing(files, base, whole, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "load", None)
    evaluate.main(arguments(files, base, whole, "bpb", *SIX, "--json"))
    assert json.loads(capsys.readouterr().out) == json.loads((whole / "summary.json").read_text())


def command_of_a_rank(argv):
    evaluate.main(argv)


def test_two_ranks_write_the_file_of_one(files, base, whole, tmp_path):
    run_ranks(2, command_of_a_rank, arguments(files, base, tmp_path / "run", "bpb", *SIX))
    assert (tmp_path / "run/results.jsonl").read_bytes() == (whole / "results.jsonl").read_bytes()


def test_results_of_other_settings_or_weights_are_not_gone_on_with(files, base, tmp_path):
    run(files, base, tmp_path / "run", "bpb", "--limit", "1")
    with pytest.raises(InputError, match="limit was 1 and is 2"):
        run(files, base, tmp_path / "run", "bpb", "--limit", "2")
    with pytest.raises(InputError, match="prompts was"):
        run(files, base, tmp_path / "run", "bpb", "--limit", "1", "--system", write_text(tmp_path / "system", "Brief."))
    M.save_model(M.load_model(base).init_weights(9), tmp_path / "other", source=base)
    with pytest.raises(InputError, match="weights was"):
        run(files, tmp_path / "other", tmp_path / "run", "bpb", "--limit", "1")
    (tmp_path / "run/config.json").unlink()
    with pytest.raises(InputError, match=r"results.jsonl without config.json"):
        run(files, base, tmp_path / "run", "bpb", "--limit", "1")


def test_the_primary_comparison_cannot_be_named_afterwards(files, base, whole):
    turned = [*SIX[:1], *reversed(ARMS), *SIX[1 + len(ARMS):]]
    for flags, reason in ((turned, "arms was"), ([*SIX, "--primary", "none", ARMS[1]], "primary was None and is")):
        with pytest.raises(InputError, match=reason):
            run(files, base, whole, "bpb", *flags)


def test_an_arm_whose_settings_have_changed_is_another(files, base, tmp_path, monkeypatch):
    """The arm keeps its name, and the first three of the settings stand in other files than the next two."""
    arms = ["--limit", "1", "--arms", "none", "random-ttt:k=4"]
    run(files, base, tmp_path / "run", "bpb", *arms)
    for change in ((ttt.ASKED, "fall", 0.5), (ttt.ASKED, "new", 2), (ttt.ASKED, "far", 0.4),
                   (arms_module.TTT, "lr", 1e-5), (arms_module.TTT, "context_k", 1)):
        with monkeypatch.context() as patch, pytest.raises(InputError, match="arms was"):
            patch.setitem(*change)
            run(files, base, tmp_path / "run", "bpb", *arms)


def test_two_runs_do_not_write_one_folder(files, base, tmp_path):
    with held_elsewhere(tmp_path / "run") as other, pytest.raises(InputError, match=f"process {other.pid}"):
        run(files, base, tmp_path / "run", "bpb")


def test_a_question_that_does_not_fit_is_refused_before_the_model_is_loaded(files, base, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load", None)
    write_jsonl(tmp_path / "long.jsonl", [ROWS[0], ROWS[1] | {"instruction": "why " * 8200}])
    with pytest.raises(InputError, match=r"long.jsonl:2: prompt and answer have 9,\d\d\d tokens; .* at most 8,192"):
        run(files, base, tmp_path / "run", "bpb", "--data", tmp_path / "long.jsonl")


def test_weights_that_are_not_sound_are_noticed_and_no_rank_waits_for_another(files, base, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(evaluate, "from_all", lambda world, value: (given.append(value), from_all(world, value))[1])
    model = M.load_model(base)
    model.norm.weight.data[0] = math.nan
    M.save_model(model, tmp_path / "nan", source=base)
    with pytest.raises(InputError, match=r"medqa.jsonl:1: a log-likelihood is not finite"):
        run(files, tmp_path / "nan", tmp_path / "run", "loglik")
    assert isinstance(given[0], InputError)


@pytest.mark.parametrize("measure, flags, reason", [
    ("loglik", ["--benchmark", "sft"], "expected bpb with sft"), ("bpb", ["--benchmark", "medqa"], "expected bpb with"),
    ("loglik", ["--prompt", "raw", "--arms", "none", "context"], "raw text has no turns"),
    ("bpb", ["--prompt", "raw"], "expected --measure loglik"),
    ("bpb", ["--arms", "none", "none"], "stands there twice"),
    ("bpb", ["--arms", "none", "--primary", "none", "nearest"], "expected two of --arms"),
    ("bpb", ["--arms", "best"], "found 'best', expected one of none"), ("bpb", ["--limit", "0"], "found '0'"),
    ("bpb", ["--cluster", "page"], "page"),
    ("loglik", ["--temperature", "1"], "--temperature: expected left out, because --measure loglik of --arms none"),
    ("loglik", ["--answer-tokens", "9"], "--answer-tokens: expected left out"),
    ("bpb", ["--by", "text", "--max-new-tokens", "9"], "--by and --max-new-tokens: expected left out"),
    ("generate", ["--by", "text"], "--by: expected left out"), ("bpb", ["--top-p", "0.5"], "--top-p: expected left"),
    ("bpb", ["--index", "x", "--encoder", "x", "--leaks", "off", "--record-tokens", "99"],
     "--index and --encoder and --leaks and --record-tokens: expected left out")])
def test_flags_that_contradict_are_named(files, base, tmp_path, measure, flags, reason):
    with pytest.raises(InputError, match=reason):
        run(files, base, tmp_path / "run", measure, *flags)
    assert not (tmp_path / "run/results.jsonl").exists()

# ----- several runs --------------------------------------------------------------------------------------------------


def test_two_models_are_compared_question_by_question(files, base, tmp_path, capsys):
    M.save_model(M.load_model(base).init_weights(9), tmp_path / "other", source=base)
    one = run(files, base, tmp_path / "one", "loglik", "--arms", "none", "context:k=1")
    other = run(files, tmp_path / "other", tmp_path / "two", "loglik", "--arms", "none", "context:k=1")
    capsys.readouterr()
    found = evaluate.compare(tmp_path / "one", tmp_path / "two")
    for comparison, arm in zip(found, ("none", "context:k=1")):
        expected = [other[i, arm]["margin"] - one[i, arm]["margin"] for i in range(1, 6)]
        assert comparison["difference"] == pytest.approx(np.mean(expected))
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'two'} none − {tmp_path / 'one'} none: ")
    run(files, base, tmp_path / "three", "bpb")
    with pytest.raises(InputError, match="measure is 'loglik' and 'bpb'"):
        evaluate.main(["compare", str(tmp_path / "one"), str(tmp_path / "three")])


def test_a_ladder_compares_every_rung_with_the_first(files, base, tmp_path, capsys):
    top = tmp_path / "runs/dpo/model"
    M.save_model(M.load_model(base).init_weights(9), top, source=base)
    evaluate.main(["ladder", "--models", str(base), str(top), "--benchmark", f"medqa={files / 'medqa.jsonl'}",
                   f"sft={files / 'rows.jsonl'}", "--index", str(files / "index"), "--arms", "none", "context:k=1",
                   "--out", str(tmp_path / "ladder"), "--device", "cpu"])
    out = capsys.readouterr().out
    rungs = [line.split("|")[2].strip() for line in out.splitlines() if line.startswith("| medqa") or "| rows" in line]
    name = base.parent.name if base.name == "model" else base.name
    assert rungs == [name, "dpo", "dpo + context:k=1"] * 2
    first, last = (evaluate.results_of(tmp_path / "ladder" / rung / "medqa")[1] for rung in (name, "dpo"))
    expected = np.mean([b["margin"] - a["margin"] for a, b in zip(first["none"], last["context:k=1"])])
    comparisons = json.loads((tmp_path / "ladder/ladder.json").read_text())["comparisons"]
    assert [one["primary"] for one in comparisons] == [False, True, False, True]
    assert comparisons[1]["difference"] == pytest.approx(expected)
    flags = ["--benchmark", f"medqa={files / 'medqa.jsonl'}", "--limit", "1", "--out", str(tmp_path / "one"),
             "--device", "cpu", "--json"]
    evaluate.main(["ladder", "--models", str(base), str(top), *flags])  # one question: no interval
    assert json.loads(capsys.readouterr().out)["rows"][1][3].endswith(" (– to –)")
    with pytest.raises(InputError, match="two files are called medqa, medqa; expected different names"):
        evaluate.main(["ladder", "--models", str(base), *flags, "--benchmark", "medqa=a/medqa.jsonl", "sft=medqa.json"])
    with pytest.raises(InputError, match="expected different folders"):
        evaluate.main(["ladder", "--models", str(base), str(base), "--benchmark", "sft=x", "--out", str(tmp_path)])
