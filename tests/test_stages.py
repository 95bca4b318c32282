"""The scripts of the stages, each driven by hand: the calls that it wants, and the row that it makes of the replies."""
import itertools
import json

import pytest
from conftest import FakeTeacher, MemoryStore

import prompts
import stages
from benchmarks import extracted
from calls import Call, key_of
from dataset import work_row
from files import InputError
from stages import Dropped, Scores, together
from synth import Run

TEXT, Q = "Warfarin needs monitoring.", "Which drug needs its INR watched?"
OPTIONS = {"A": "Heparin", "B": "Warfarin", "C": "Aspirin", "D": "Clopidogrel"}
TRACE = "## Thought\n\nHm, {}.\n\n## Summarization\n\nIt is {}."


def row_of(**more):
    return {"id": "1", "source": "c.jsonl:1", "text": TEXT, "questions": [], "responses": [], "truth": None,
            "calls": {}} | more


def run_of(answer=None, **more):
    store = MemoryStore()
    teacher, reasoner, judge = (FakeTeacher(store, answer, name) for name in ("teacher", "reasoner", "judge"))
    return Run(None, store, **{"teacher": teacher, "reasoner": reasoner, "judge": judge, "ranker": judge} | more)


def play(stage, run, row):
    """(the row that follows or Dropped, [(model, prompt) of every call in order])."""
    script, replies, asked = stages.SCRIPTS[stage](run, row), None, []
    try:
        while True:
            wanted = script.send(replies)
            asked += [(teacher.model, call) for teacher, call in wanted]
            replies = [reply if isinstance(teacher, FakeTeacher) and (reply := teacher.reply(call))
                       else next(teacher.ask([call]))[1] for teacher, call in wanted]
    except StopIteration as end:
        return end.value, asked
    except Dropped as lost:
        return lost, asked


def said(call):
    return call.messages[-1]["content"]

# ----- classify, ask, score, select ----------------------------------------------------------------------------------


@pytest.mark.parametrize("replies, department, specialty", [
    (["Surgery", "Urology"], "Surgery", "Urology"), ([" Surgery\n", "None"], "Surgery", "None"),
    (["Surgery", "Cardiology"], "Surgery", "unknown"), (["surgery"], "unknown", "unknown"),
    (["None"], "unknown", "unknown"), ([ValueError("timed out")], "unknown", "unknown"),
    (["Surgery", ValueError("timed out")], "Surgery", "unknown"), (["Urology"], "unknown", "unknown")])
def test_a_text_has_its_department_and_a_specialty_of_that(replies, department, specialty):
    left = iter(replies)
    row, asked = play("classify", run_of(lambda call: next(left)), row_of())
    assert (row["department"], row["specialty"]) == (department, specialty) and len(asked) == len(replies)
    assert all(model == "teacher" and TEXT in said(call) for model, call in asked)
    assert "\nPediatrics\n" in said(asked[0][1]) and asked[0][1].parameters["temperature"] == 0
    if len(asked) > 1:
        assert "\nThoracic Surgery\n" in said(asked[1][1]) and "Cardiology" not in said(asked[1][1])


def test_a_text_is_cut_for_its_prompts_but_kept_whole():
    result, asked = play("classify", run_of(lambda call: "surgery"), row_of(text="§" * 40_000))
    assert said(asked[0][1]).count("§") == 32_628 and len(result["text"]) == 40_000
    assert stages.TALLIES["classify"](result) == ["unknown", "unknown: unknown", "text cut"]
    assert "text cut" not in stages.TALLIES["classify"](result | {"text": "§" * 32_628})


def test_a_row_without_a_text_is_filed_by_its_question():
    _, asked = play("classify", run_of(lambda call: "surgery"), row_of(text="", questions=[Q]))
    assert f"<passage>\n{Q}\n</passage>" in said(asked[0][1])
    _, asked = play("score", run_of(lambda call: "{"), row_of(text="", questions=[Q]))
    assert "<passage>\n(none)\n</passage>" in said(asked[0][1])


def test_two_questions_are_asked_for_unless_the_row_has_one():
    run = run_of(lambda call: {"question_1": "Why?", "question_2": "How?"})
    row, asked = play("ask", run, row_of())
    assert row["questions"] == ["Why?", "How?"] and len(asked) == 1
    assert asked[0][1].parameters == {"temperature": 1, "top_p": 0.9, "max_tokens": 256, "seed": 0}
    assert play("ask", run, row_of(questions=[Q])) == (row_of(questions=[Q]), [])
    lost, _ = play("ask", run_of(lambda call: {"question_1": "Why?", "question_2": "Why?"}), row_of())
    assert lost.args == ("no two questions", '{"question_1": "Why?", "question_2": "Why?"}')
    lost, _ = play("ask", run_of(lambda call: ValueError("timed out")), row_of())
    assert lost.args == ("no reply", "timed out")


def test_each_question_is_scored_by_itself_and_a_missing_score_is_none():
    def answer(call):
        if "<question>\nWhy?" in said(call):
            return {"quality": 8, "difficulty": 11, "relevance": 6, "mentions_case_details": False}
        return ValueError("timed out")
    row, asked = play("score", run_of(answer), row_of(questions=["Why?", "How?"]))
    nothing = {"quality": None, "difficulty": None, "relevance": None, "mentions": None}
    assert row["scores"] == [nothing | {"quality": 8, "relevance": 6, "mentions": False}, nothing]
    assert len(asked) == 2 and asked[0][1].parameters["temperature"] == 0.8


def scored(quality, difficulty, relevance=5, mentions=False):
    return {"quality": quality, "difficulty": difficulty, "relevance": relevance, "mentions": mentions}


@pytest.mark.parametrize("difficulty, kind", [(8, "common"), (9, "complex"), (1, "common"), (10, "complex")])
def test_a_difficulty_above_8_is_complex(difficulty, kind):
    row = row_of(questions=["Why?", "How?"], scores=[scored(5, 1, 1), scored(7, difficulty)])
    result, asked = play("select", run_of(), row)
    assert result["instruction"] == "How?" and result["instruction_type"] == kind and asked == []
    assert (result["quality"], result["difficulty"], result["relevance"], result["chosen_by"]) == (
        7, difficulty, 5, "sum")


def test_a_text_without_a_question_to_choose_is_dropped_with_its_scores():
    both = [scored(9, 9, mentions=True)] * 2
    lost, _ = play("select", run_of(), row_of(questions=["Why?", "How?"], scores=both))
    assert lost.args == ("case details", json.dumps(both))
    one = [scored(9, 9, mentions=True), scored(9, None)]  # chosen to the letter, but common or complex?
    lost, _ = play("select", run_of(), row_of(questions=["Why?", "How?"], scores=one))
    assert lost.args == ("chosen without scores", json.dumps(one))


def test_a_tie_goes_by_the_texts_and_the_seed_not_by_the_order():
    questions, same = ["Why?", "How?"], [scored(7, 7)] * 2
    chosen = [[play("select", run_of(seed=seed), row_of(id=str(i), questions=order, scores=same))[0]["instruction"]
               for i in range(40)] for order in (questions, questions[::-1]) for seed in (0, 1)]
    assert chosen[0] == chosen[2] != chosen[1] == chosen[3]
    assert 10 < chosen[0].count("Why?") < 30

# ----- respond -------------------------------------------------------------------------------------------------------


def test_a_common_question_has_two_answers_of_the_teacher():
    run = run_of(lambda call: {"answer_1": "It is warfarin.", "answer_2": "- warfarin"})
    row, asked = play("respond", run, row_of(instruction=Q, instruction_type="common"))
    assert row["responses"] == [{"text": "It is warfarin."}, {"text": "- warfarin"}]
    assert [model for model, _ in asked] == ["teacher"] and TEXT in said(asked[0][1]) and Q in said(asked[0][1])


def test_a_complex_question_has_two_samples_of_the_reasoner():
    run = run_of(lambda call: ("Hm.", f"It is {'warfarin' if call.parameters['seed'] == 7 else 'heparin'}."), seed=7)
    row, asked = play("respond", run, row_of(instruction=Q, instruction_type="complex"))
    assert [one["text"] for one in row["responses"]] == [
        f"## Thought\n\nHm.\n\n## Summarization\n\nIt is {drug}." for drug in ("warfarin", "heparin")]
    assert [(model, call.parameters["seed"]) for model, call in asked] == [("reasoner", 7), ("reasoner", 8)]
    assert all(TEXT in said(call) and "## Summarization" in said(call) for _, call in asked)
    _, asked = play("respond", run, row_of(instruction=Q, instruction_type="complex", text=""))
    assert "<background>" not in said(asked[0][1])


def test_a_sample_without_a_thought_is_left_out_and_a_row_of_such_is_dropped():
    left = iter(["So.", "## Thought\nHm.\n## Summarization\nSo."])
    row, _ = play("respond", run_of(lambda call: next(left)), row_of(instruction=Q, instruction_type="complex"))
    assert [one["text"] for one in row["responses"]] == ["## Thought\n\nHm.\n\n## Summarization\n\nSo."]
    lost, _ = play("respond", run_of(lambda call: "So."), row_of(instruction=Q, instruction_type="complex"))
    assert lost.args == ("no thought and answer", "So.")

# ----- verify --------------------------------------------------------------------------------------------------------

RIGHT = [  # the right option is B, warfarin
    "The answer is (B).", "The answer is B.", "The answer is: B", "**The answer is (B).**", "Answer: B",
    "The correct answer is (B).", "The best answer is B, warfarin.", "My answer is option B.",
    "The answer is \\boxed{B}.",
    "So the final answer is **B**.", "The answer is (B) because the INR shows its effect.", "the answer is (b).",
    "At first I said the answer is (A). On reflection, the answer is (B).", "The answer is not (A). The answer is (B).",
    "Warfarin blocks vitamin K.\nThe answer is (B).", "## Thought\nIs it A?\n## Summarization\nThe answer is (B).",
    "<think>The answer is (C).</think>\nThe answer is (B).", "The answer is (B)\n\nI hope that helps.",
    "Heparin is followed by aPTT, so A is out. The answer is (B).", "The answer is B: Warfarin", "“The answer is (B).”",
    "The answer is (Ｂ).", "The answer is B - warfarin needs its INR watched.", "The most likely answer is (B)."]
WRONG = [
    "The answer is (A).", "The answer is C.", "The answer is: D", "**The answer is (A).**", "Answer: C",
    "The correct answer is (D).", "The best answer is A, heparin.", "My answer is option C.",
    "The answer is \\boxed{D}.", "So the final answer is **A**.", "The answer is (C) because of platelets.",
    "the answer is (d).", "At first I said the answer is (B). On reflection, the answer is (A).",
    "The answer is not (B). The answer is (C).", "Warfarin is what I wrote, but the answer is (D).",
    "## Thought\nThe answer is (B).\n## Summarization\nThe answer is (A).",
    "<think>The answer is (B).</think>\nThe answer is (C).", "The answer is (D)\n\nI hope that helps.",
    "Warfarin is followed by INR, so B is in. Still, the answer is (A).", "The answer is C: Aspirin",
    "“The answer is (D).”", "The answer is (Ａ).", "The answer is C - aspirin.", "The most likely answer is (D)."]
TWO = [
    "The answer is (A) or (B).", "The answer is A and B.", "The answer is B, C.", "The answer is (A)/(B).",
    "The answer is B or D.", "The answer is (B) and (C).", "Answer: A & B", "The answer is A-C.", "The answer is B/D.",
    "The answer is either (A) or (B).", "The answer is both B and C.", "The answer is (B), (C).",
    "The correct answer is (C) or (B).", "The answer is A to C.", "The answer is (A) through (C).",
    "The answer is neither A nor B.", "The answer is between (B) and (C).", "The answer is B & D.",
    "First, the answer is (B). Then again, the answer is (A) or (B).", "The answer is (D) and (B).", "Answer: B or C",
    "The final answer is (B)/(C).", "The answer is **A** or **B**.", "The answer is (A), (B)."]
NONE = [
    "", "Warfarin.", "Warfarin needs its INR watched.", "B", "(B)", "Option B.", "I would choose B.",
    "The answer is warfarin.", "The answer is unclear.", "The answer is not (B).", "Is the answer (B)?",
    "If the answer is (B), the INR is watched.", "The answer is (E).", "The answer is (X).", "A fever is rare.",
    "The answer is a matter of debate.", "<think>The answer is (B).</think>", "## Thought\nThe answer is (B).",
    "I cannot tell.", "None of these.", "The answer is B cell lymphoma.", "The answer is D-dimer.",
    "The answer is vitamin K.", "It depends on the patient's kidneys."]
OLD, NEW = "ABCD", {"A": "Warfarin", "B": "Clopidogrel", "C": "Heparin", "D": "Aspirin"}  # now A is right


def labelled():
    """(options, right letter, output, label): 120."""
    for output, label in [*((text, "verified") for text in RIGHT), *((text, "wrong") for text in WRONG),
                          *((text, "unproven") for text in TWO + NONE)]:
        yield OPTIONS, "B", output, label
    for text in RIGHT[:12]:  # the options are shuffled: the old letter is another option now …
        yield NEW, "A", text, "wrong"
    for text in ("The answer is (A).", "The answer is A.", "The answer is: A", "**The answer is (A).**", "Answer: A",
                 "The correct answer is (A).", "The best answer is A, warfarin.", "My answer is option A.",
                 "The answer is \\boxed{A}.", "So the final answer is **A**.", "The answer is (A) because of the INR.",
                 "I first had (B), but the answer is (A)."):  # … and the new one is right
        yield NEW, "A", text, "verified"


@pytest.mark.parametrize("asked_again", [True, False])
def test_the_verifier_on_120_outputs_labelled_by_hand(asked_again):
    cases = list(labelled())
    assert len(cases) == 120 and [len(set(one)) for one in (RIGHT, WRONG, TWO, NONE)] == [24] * 4
    for options, letter, output, label in cases:
        run = run_of(lambda call, output=output: output, attempts=0, **({} if asked_again else {
            "teacher": None, "reasoner": None}))
        row = row_of(instruction=Q, responses=[{"text": "It is warfarin." if asked_again else output}],
                     truth={"options": options, "letter": letter}, instruction_type="complex")
        result, asked = play("verify", run, row)
        found = "wrong" if isinstance(result, Dropped) else result["responses"][0]["label"]
        assert found == label, output
        assert len(asked) == asked_again
    assert {label for *_, label in cases} == {"verified", "wrong", "unproven"}


def test_the_finished_answer_is_asked_again_with_the_options():
    run = run_of(lambda call: "The answer is (B).")
    row = row_of(instruction=Q, instruction_type="complex", truth={"options": OPTIONS, "letter": "B"},
                 responses=[{"text": TRACE.format("heparin", "warfarin")}])
    result, asked = play("verify", run, row)
    assert [(one["role"], one["content"]) for one in asked[0][1].messages[:2]] == [
        ("user", Q), ("assistant", "It is warfarin.")]
    assert "A. Heparin\nB. Warfarin\nC. Aspirin\nD. Clopidogrel" in said(asked[0][1])
    assert result["responses"] == [{"text": TRACE.format("heparin", "warfarin"), "label": "verified",
                                    "evidence": "letter B", "tried": []}]


TRACES = [  # the shape of HuatuoGPT-o1's: the question is open, the options stand apart, and no letter is named
    {"instruction": "Which nerve is at risk in a fracture of the shaft of the humerus?", "instruction_type": "complex",
     "response": "## Thought\n\nOkay, the shaft. The axillary nerve is higher up, so B it is not.\n\n"
                 "## Summarization\n\nThe radial nerve, which winds around the shaft.", "language": "en",
     "question": "Fracture of the shaft of the humerus damages: 1. axillary 2. radial", "answer_idx": "A",
     "options": {"A": "Radial nerve", "B": "Axillary nerve", "C": "1,2 & 3", "D": "All"}},
    {"instruction": "What explains a raised lactate after a night of drinking?", "instruction_type": "complex",
     "response": "## Thought\n\nA. high NADH turns pyruvate into lactate. D? No.\n\n## Summarization\n\n1. **NADH** is "
                 "high.\n2. Pyruvate becomes lactate.", "language": "en", "question": "Raised lactate is due to",
     "options": {"A": "Sepsis", "B": "NADH", "C": "Thiamine", "D": "Metformin"}, "answer_idx": "B"}]


@pytest.mark.parametrize("trace", TRACES)
def test_a_trace_that_names_no_letter_is_unproven_never_wrong(trace):
    row = work_row(trace, "traces.jsonl:1")
    result, asked = play("verify", run_of(teacher=None, reasoner=None), row)
    assert [(one["label"], one["evidence"]) for one in result["responses"]] == [("unproven", "letter None")]
    assert asked == [] and extracted(trace["response"], trace["options"]) is None
    result, asked = play("verify", run_of(lambda call: "I cannot tell."), row)  # nor asked again
    assert [one["label"] for one in result["responses"]] == ["unproven"] and len(asked) == 1


def test_a_row_without_truth_is_unproven_and_nobody_is_asked():
    row = row_of(instruction=Q, instruction_type="common", responses=[{"text": "Yes."}, {"text": "No."}])
    result, asked = play("verify", run_of(), row)
    assert [one["label"] for one in result["responses"]] == ["unproven"] * 2 and asked == []


@pytest.mark.parametrize("reply, label", [
    ({"reason": "same", "agrees": True}, "judged"), ({"reason": "?", "agrees": "yes"}, "unproven"),
    ({"reason": "?", "agrees": 1}, "unproven"), (ValueError("timed out"), "unproven"), ("{", "unproven")])
def test_an_open_answer_is_judged_with_both_texts(reply, label):
    row = row_of(instruction=Q, instruction_type="common", responses=[{"text": "It is warfarin."}],
                 truth={"reference": "Warfarin, by its INR."})
    result, asked = play("verify", run_of(lambda call: reply), row)
    assert result["responses"][0]["label"] == label and [model for model, _ in asked] == ["judge"]
    assert all(part in said(asked[0][1]) for part in (Q, "It is warfarin.", "Warfarin, by its INR."))
    result, asked = play("verify", run_of(judge=None), row)
    assert result["responses"][0]["label"] == "unproven" and asked == []


def tries(right_after, attempts=3, samples=1, truth=None):
    """Verifies traces whose writer names the right letter after so many retries."""
    def answer(call):
        text = call.messages[-2]["content"] if len(call.messages) > 1 else ""
        if "Now choose" in said(call):
            return f"The answer is ({'B' if text == f'It is drug {right_after}.' else 'A'})."
        if "<reference>" in said(call):
            return {"reason": "", "agrees": f"It is drug {right_after}." in said(call)}
        n = int(text.split("drug ")[1].split(".")[0]) + 1
        return TRACE.format("again", f"drug {n}")
    row = row_of(instruction=Q, instruction_type="complex", truth=truth or {"options": OPTIONS, "letter": "B"},
                 responses=[{"text": TRACE.format(i, "drug 0")} for i in range(samples)])
    return play("verify", run_of(answer, attempts=attempts), row)


@pytest.mark.parametrize("right_after", [0, 1, 2, 3])
def test_a_wrong_trace_is_written_again_in_other_ways_until_it_is_right(right_after):
    result, asked = tries(right_after)
    one, = result["responses"]
    assert one["label"] == "verified" and one["text"].endswith(f"It is drug {right_after}.")
    assert len(one["tried"]) == len(set(one["tried"])) == right_after and {*one["tried"]} <= {*prompts.STRATEGIES}
    again = [said(call) for model, call in asked if len(call.messages) == 3 and "Now choose" not in said(call)]
    assert len(again) == right_after
    for way, text in zip(one["tried"], again):
        assert prompts.PROMPTS["verify"][way] in text


def test_attempts_are_bounded_and_all_four_ways_come_before_one_is_repeated():
    lost, asked = tries(99)
    assert lost.args == ("wrong", '["letter A"]') and len(asked) == 1 + 2 * 3
    _, asked = tries(99, attempts=5)
    ways = [next(way for way in prompts.STRATEGIES if prompts.PROMPTS["verify"][way] in said(call))
            for _, call in asked if "Now choose" not in said(call)]
    assert {*ways[:4]} == {*prompts.STRATEGIES} and ways[4] == ways[0]
    _, asked = tries(99, attempts=0)
    assert len(asked) == 1


def test_the_right_answer_is_never_told_to_the_writer():
    _, asked = tries(99)
    for _, call in asked:
        text = json.dumps(call.messages)
        assert text.count("(B)") == text.count("B.") - text.count("B. Warfarin") == 0
        assert ("Warfarin" in text) == ("Now choose" in said(call))  # as one of four options
    _, asked = tries(1, truth={"reference": "Warfarin"})
    assert {model for model, call in asked if "Warfarin" in json.dumps(call.messages)} == {"judge"}
    assert {model for model, _ in asked} == {"judge", "reasoner"}


def test_two_samples_are_checked_side_by_side_and_one_that_stays_wrong_is_kept_as_wrong():
    def answer(call):
        good = "drug 1" in json.dumps(call.messages)
        return f"The answer is ({'B' if good else 'C'})." if "Now choose" in said(call) else ValueError("timed out")
    row = row_of(instruction=Q, instruction_type="complex", truth={"options": OPTIONS, "letter": "B"},
                 responses=[{"text": TRACE.format(i, f"drug {i}")} for i in range(2)])
    result, _ = play("verify", run_of(answer), row)
    assert [(one["label"], len(one["tried"])) for one in result["responses"]] == [("wrong", 3), ("verified", 0)]


def test_scripts_run_together_ask_in_one_go():
    def script(name, rounds):
        heard = []
        for i in range(rounds):
            heard += yield [f"{name}{i}", f"{name}{i}'"]
        return heard
    both = together(script("a", 1), script("b", 3), script("c", 0))
    asked, replies = [], None
    with pytest.raises(StopIteration) as end:
        while True:
            asked.append(both.send(replies))
            replies = [one.upper() for one in asked[-1]]
    assert asked == [["a0", "a0'", "b0", "b0'"], ["b1", "b1'"], ["b2", "b2'"]]
    assert end.value.value == [["A0", "A0'"], ["B0", "B0'", "B1", "B1'", "B2", "B2'"], []]

# ----- rank, pair ----------------------------------------------------------------------------------------------------


def responses(*pairs):
    return [{"text": text, "label": label} for text, label in pairs]


def ranked(answer, *pairs, **more):
    return play("rank", run_of(answer, **more), row_of(instruction=Q, responses=responses(*pairs)))


def test_the_answer_with_the_higher_score_is_kept():
    def answer(call):
        return {"score": 9 if "<answer>\nlong" in said(call) else 4}
    for order in ([("long", "unproven"), ("short", "unproven")], [("short", "unproven"), ("long", "unproven")]):
        row, asked = ranked(answer, *order)
        assert (row["response"], row["ranked_by"], sorted(row["ranking"])) == ("long", "score", [4, 9])
        assert [model for model, _ in asked] == ["judge"] * 2


def test_a_wrong_answer_is_never_kept_and_a_better_proved_one_comes_first():
    def answer(call):
        return {"score": 9 if "<answer>\nlong" in said(call) else 4}
    row, asked = ranked(answer, ("long", "wrong"), ("short", "unproven"))
    assert (row["response"], row["ranked_by"], row["ranking"], asked) == ("short", "the only one", [], [])
    order = ("verified", "judged", "unproven")
    for better, worse in itertools.combinations(order, 2):
        row, _ = ranked(answer, ("long", worse), ("short", better))
        assert (row["response"], row["label"], row["ranked_by"]) == ("short", better, "proof")


def test_a_missing_score_loses_and_a_tie_goes_by_the_texts_and_the_seed():
    row, _ = ranked(lambda call: ValueError("x") if "<answer>\nlong" in said(call) else {"score": 1},
                    ("long", "unproven"), ("short", "unproven"))
    assert (row["response"], row["ranking"], row["ranked_by"]) == ("short", [None, 1], "score")

    def kept(order, seed):
        pairs = [(text, "unproven") for text in order]
        return [play("rank", run_of(lambda call: {"score": 5}, seed=seed),
                     row_of(id=str(i), instruction=Q, responses=responses(*pairs)))[0]["response"] for i in range(40)]
    first = kept(["long", "short"], 0)
    assert first == kept(["short", "long"], 0) != kept(["long", "short"], 1) and 10 < first.count("long") < 30
    row, asked = ranked(None, ("long", "unproven"), ("short", "unproven"), ranker=None)
    assert row["ranked_by"] == "random" and asked == []


def test_a_function_scores_in_batches_and_its_scores_are_stored():
    store, sizes = MemoryStore(), []

    def score(pairs):
        sizes.append(len(pairs))
        return [len(answer) / len(question) for question, answer in pairs]
    ranker = Scores("reward", score, store, batch=3)
    calls = [Call(({"role": "user", "content": "four"}, {"role": "assistant", "content": "x" * i}), {})
             for i in range(7)]
    assert [(i, reply.value) for i, reply in ranker.ask(calls)] == [(i, {"score": i / 4}) for i in range(7)]
    assert sizes == [3, 3, 1] and store[key_of("reward", calls[5])].value == {"score": 1.25}

    def narrow(pairs):
        if any(len(answer) > 4 for _, answer in pairs):
            raise InputError("too long")
        return score(pairs)
    replies = [reply for _, reply in Scores("narrow", narrow, store, batch=4).ask(calls)]
    assert [(reply.value, reply.failure) for reply in replies] == [
        ({"score": i / 4}, None) if i < 5 else (None, "too long") for i in range(7)]
    row, asked = ranked(None, ("xx", "unproven"), ("xxx", "unproven"), ranker=ranker)
    assert row["response"] == "xxx" and row["ranking"] == [2 / len(Q), 3 / len(Q)]
    assert [one["content"] for one in asked[0][1].messages] == [Q, "xx"]


def complex_row(**more):
    return row_of(instruction=Q, instruction_type="complex", response=TRACE.format("a", "warfarin"), **more)


def test_a_plain_answer_is_rejected():
    row, asked = play("pair", run_of(lambda call: " Warfarin. "), complex_row())
    assert (row["rejected"], row["paired"]) == ("Warfarin.", "plain")
    assert [(model, said(call).startswith(Q)) for model, call in asked] == [("teacher", True)]
    for reply in (ValueError("timed out"), " ", complex_row()["response"]):
        row, _ = play("pair", run_of(lambda call, reply=reply: reply), complex_row())
        assert row["paired"] == "no other answer" and "rejected" not in row
    assert play("pair", run_of(), row_of(instruction_type="common"))[0]["paired"] == "common"


@pytest.mark.parametrize("truth, letter, scores, paired", [
    (True, "A", (5, 5), "wrong"), (True, "B", (5, 4), "scored lower"), (True, "B", (5, 5), "not worse"),
    (False, "", (5, 4), "scored lower"), (False, "", (4, 5), "not worse"), (False, "", (5, None), "not worse"),
    (False, "", (None, 5), "not worse")])
def test_an_on_policy_answer_is_rejected_only_if_it_is_worse(truth, letter, scores, paired):
    def judge(call):
        score = scores["<answer>\nMaybe" in said(call)]
        return ValueError("x") if score is None else {"score": score}

    def policy(call):
        return f"The answer is ({letter})." if "Now choose" in said(call) else "Maybe."
    run = run_of(judge, policy=FakeTeacher(MemoryStore(), policy, "policy"))
    row, asked = play("pair", run, complex_row(truth={"options": OPTIONS, "letter": "B"} if truth else None))
    assert row["paired"] == paired and row.get("rejected") == (None if paired == "not worse" else "Maybe.")
    assert asked[0][0] == "policy" and said(asked[0][1]).startswith(Q) and "step by step" in said(asked[0][1])

# ----- judge ---------------------------------------------------------------------------------------------------------


def test_a_row_is_judged():
    row = {"source": "x:1", "instruction": Q, "response": "Warfarin.", "calls": {}}
    result, asked = play("judge", run_of(lambda call: {"quality": 7, "complexity": 3}), row)
    assert result == {"source": "x:1", "instruction": Q, "quality": 7, "complexity": 3, "calls": {}}
    assert asked[0][0] == "judge" and "<response>\nWarfarin.\n" in said(asked[0][1])
    assert play("judge", run_of(lambda call: {"quality": 7, "complexity": 0}), row)[0].args[0] == "no scores"
    assert play("judge", run_of(lambda call: ValueError("x")), row)[0].args == ("no reply", "x")


@pytest.mark.parametrize("said_of, better", [
    (("first", "second"), "A"), (("second", "first"), "B"), (("first", "first"), "neither"),
    (("second", "second"), "neither"), (("equal", "first"), "neither"), (("equal", "equal"), "neither"),
    (("first", "equal"), "neither")])
def test_two_answers_are_compared_in_both_orders(said_of, better):
    def answer(call):
        return {"better": said_of[said(call).index("Alpha") > said(call).index("Beta")]}
    row = {"source": "x:1", "instruction": Q, "answers": ["Alpha", "Beta"], "calls": {}}
    result, asked = play("compare", run_of(answer), row)
    assert result["better"] == better and result["said"] == [*said_of] and len(asked) == 2
    same_place = said_of[0] == said_of[1] != "equal"
    assert stages.TALLIES["compare"](result) == [better] + ["the same place twice"] * same_place
    assert play("compare", run_of(lambda call: {"better": ["first"]}), row)[0].args[0] == "no preference"
