"""The prompts of synth.py, the forms of their replies, and the rules that read them: constants and pure functions.

    PROMPTS[stage][name]  a text with {places}      SCHEMAS[name]  the JSON that is asked for      PARAMETERS[name]
    specialty_of, questions_of, scores_of, answers_of, trace_of    what a reply says, or None
    choose                                                         FineMedLM-o1's choice between two questions

The sentences are this project's own; they ask for what the original's notebooks ask for (arXiv 2501.09213, section 3).
A call is kept under a hash of its messages, parameters and schema, so a change in here is asked again, and so is what
depends on it; nothing else is.
"""
import hashlib
import json
import re

from benchmarks import split_thought
from messages import with_thought

DEPARTMENTS = {
    "Internal Medicine": ("Respiratory and Critical Care Medicine", "Cardiology", "Endocrinology", "Gastroenterology",
                          "Hematology", "Nephrology", "Rheumatology and Immunology", "Neurology"),
    "Surgery": ("Gastrointestinal Surgery", "Hepatobiliary Surgery", "Urology", "Cardiovascular Surgery",
                "Thoracic Surgery", "Orthopedic Surgery", "Neurosurgery", "Burns and Plastic Surgery",
                "Thyroid Surgery", "Breast Surgery"),
    "Obstetrics and Gynecology": ("Gynecology", "Obstetrics"),
    "Pediatrics": ("Pediatric Internal Medicine", "Pediatric Surgery"),
    "Otorhinolaryngology (ENT)": ("Otorhinolaryngology (ENT)", "Ophthalmology", "Dentistry (Oral Medicine)"),
    "Other Departments": ("Dermatology and Venereology", "Rehabilitation Medicine", "Anesthesiology",
                          "Traditional Chinese Medicine (TCM)"),
}
NO_SPECIALTY, UNKNOWN = "None", "unknown"  # the reply that none fits; a reply that is none of the names
COMPLEX = 8  # a question of a higher difficulty is complex
RANGES = {"quality": (1, 10), "difficulty": (1, 10), "relevance": (1, 6), "complexity": (1, 10), "score": (1, 10)}

CHAIN = ("texts", "classify", "ask", "score", "select", "respond", "verify", "rank", "pair", "filter")
ROLES = ("teacher", "reasoner", "judge", "ranker", "policy")
RULES = dict.fromkeys((*CHAIN, "judge"), 1)  # the version of each stage's code: raise one when what it does changes

# ----- prompts -------------------------------------------------------------------------------------------------------

FORM = ("Write in two parts. Begin the first with the line \"## Thought\": think aloud there, take the question apart, "
        "try more than one explanation, check each step, say where a step fails, and go back when it does. Begin the "
        "second with the line \"## Summarization\": give the reader the finished answer there, complete without the "
        "first part.")
PROMPTS = {
    "classify": {
        "department": "A hospital library files each passage under the one department whose physicians need it most."
                      "\n\n<passage>\n{text}\n</passage>\n\nThe departments:\n{names}\n\nUnder which is this passage "
                      "filed? Reply with one name, spelled as in the list, and with nothing else.",
        "specialty": "The passage below is filed under {department}. Each specialty of that department has its own "
                     "shelf.\n\n<passage>\n{text}\n</passage>\n\nThe shelves:\n{names}\n\nOn which does it belong? "
                     "Reply with one name, spelled as in the list, and with nothing else. Reply None if it belongs on "
                     "none of them.",
    },
    "ask": {
        "questions": "Here is a passage from a medical text.\n\n<passage>\n{text}\n</passage>\n\nWrite two questions "
                     "that the knowledge in it helps to answer. A reader who has never seen the passage must "
                     "understand each of them, so name every disease, drug and patient that is meant, and do not speak "
                     "of a passage, a text, a study or an author. The two should differ in subject and in kind: one "
                     "may ask for a mechanism and the other for a decision, for instance.\n\nReply with JSON alone: "
                     '{"question_1": "…", "question_2": "…"}',
    },
    "score": {
        "question": "A question was written with the help of a passage. Judge the question.\n\n<passage>\n{text}\n"
                    "</passage>\n\n<question>\n{question}\n</question>\n\nquality, 1 to 10: is it clear, precise and "
                    "free of errors?\ndifficulty, 1 to 10: how much knowledge and how many steps of reasoning does a "
                    "good answer take? 1 is a matter of common knowledge, 10 a puzzle for a board of specialists.\n"
                    "relevance, 1 to 6: how much does it belong to medicine?\nmentions_case_details, true or false: "
                    "does it lean on particulars of the passage, such as its patient, its figures or its authors, "
                    'that a reader cannot know?\n\nReply with JSON alone: {"quality": …, "difficulty": …, '
                    '"relevance": …, "mentions_case_details": …}',
    },
    "respond": {
        "common": "Answer a question on medicine twice.\n\n<question>\n{question}\n</question>\n\nThis background may "
                  "help; the reader does not have it, so do not speak of it.\n\n<background>\n{text}\n</background>"
                  "\n\nBoth answers must be right and complete. Let them differ in style: the first explains in "
                  "connected sentences, as to a patient who wants to understand; the second is arranged in points, as "
                  'a note between colleagues.\n\nReply with JSON alone: {"answer_1": "…", "answer_2": "…"}',
        "complex": "{question}\n\nThis background may help; the reader does not have it, so do not speak of it.\n\n"
                   "<background>\n{text}\n</background>\n\n" + FORM,
        "alone": "{question}\n\n" + FORM,
    },
    "verify": {
        "options": "Now choose among these options the one that your answer amounts to.\n\n{options}\n\nKeep to the "
                   "answer that you gave, even if you doubt it. Close with a line of this form, where X is a letter:\n"
                   "The answer is (X).",
        "reference": "Two answers to one question.\n\n<question>\n{question}\n</question>\n\n<reference>\n{reference}\n"
                     "</reference>\n\n<answer>\n{answer}\n</answer>\n\nThe reference is right. Does the answer come to "
                     "the same conclusion? Wording, length and added detail do not matter; a different, a missing or "
                     'a hedged conclusion does.\n\nReply with JSON alone: {"reason": "…", "agrees": true or false}',
        "retry": "A check shows that this conclusion is wrong. It does not show which one is right. {strategy} Then "
                 "write the whole answer afresh, in the same form as before and without a word about an earlier "
                 "attempt.",
        "backtrack": "Go back to the last step that you are certain of and continue from there in another direction.",
        "new path": "Leave that line of reasoning altogether and approach the question from another side.",
        "verification": "Test each step of your reasoning against what is known in medicine until you find the one "
                        "that does not hold.",
        "correction": "Look for the slip in what you wrote, a misread finding or a confused term, and put it right.",
    },
    "rank": {
        "answer": "How good is this answer to a question on medicine?\n\n<question>\n{question}\n</question>\n\n"
                  "<answer>\n{answer}\n</answer>\n\nWeigh in this order: is it right and safe; does it answer all that "
                  "is asked; does its reasoning hold; is it easy to read. Length is no merit.\n\nReply with JSON "
                  'alone, with a score from 1 to 10: {"score": …}',
    },
    "pair": {
        "plain": "{question}\n\nAnswer directly, without showing how you arrive at it.",
        "think": "{question}\n\nThink it through step by step before you answer.",
    },
    "judge": {
        "row": "A row of a data set on which a medical model is to be trained.\n\n<instruction>\n{question}\n"
               "</instruction>\n\n<response>\n{answer}\n</response>\n\nquality, 1 to 10: is the instruction clear, and "
               "the response right, complete and well put?\ncomplexity, 1 to 10: how much knowledge and reasoning do "
               'instruction and response take?\n\nReply with JSON alone: {"quality": …, "complexity": …}',
        "compare": "Two answers to one question.\n\n<question>\n{question}\n</question>\n\n<first>\n{first}\n</first>"
                   "\n\n<second>\n{second}\n</second>\n\nWhich would a physician rather rely on? Neither their order "
                   'nor their length counts.\n\nReply with JSON alone: {"better": "first", "second" or "equal"}',
    },
}
STRATEGIES = ("backtrack", "new path", "verification", "correction")  # of HuatuoGPT-o1 (arXiv 2412.18925, section 2.2)


def schema(**properties):
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def within(name):
    """Whole numbers in a range, one by one: more servers hold a reply to a list than to a minimum and a maximum."""
    low, high = RANGES[name]
    return {"type": "integer", "enum": [*range(low, high + 1)]}


def schema_of(name):
    """The JSON schema that a call's reply must have; None for one that is text."""
    text, truth = {"type": "string", "minLength": 1}, {"type": "boolean"}
    return {"questions": schema(question_1=text, question_2=text),
            "question": schema(quality=within("quality"), difficulty=within("difficulty"),
                               relevance=within("relevance"), mentions_case_details=truth),
            "common": schema(answer_1=text, answer_2=text),
            "reference": schema(reason={"type": "string"}, agrees=truth),
            "answer": schema(score=within("score")),
            "row": schema(quality=within("quality"), complexity=within("complexity")),
            "compare": schema(better={"enum": ["first", "second", "equal"]})}.get(name)


# The sampling is the original's, and so is the room of a long answer; but it gives a name 10 tokens, which cuts
# "Otorhinolaryngology (ENT)" off. Other replies have about twice the room of a right one, because a poor teacher fills
# all that there is. One that was cut is asked again with more (calls.dialogue).
CHECK, SCORES = {"temperature": 0, "max_tokens": 512}, {"temperature": 0, "max_tokens": 64}
ANSWER = {"temperature": 1, "top_p": 0.9, "max_tokens": 4096}
PARAMETERS = {
    "department": {"temperature": 0, "max_tokens": 24}, "specialty": {"temperature": 0, "max_tokens": 24},
    "questions": {"temperature": 1, "top_p": 0.9, "max_tokens": 256},
    "question": {"temperature": 0.8, "max_tokens": 96},
    "common": {**ANSWER, "max_tokens": 2048}, "complex": ANSWER, "alone": ANSWER, "retry": ANSWER, "think": ANSWER,
    "plain": {**ANSWER, "max_tokens": 512},
    "options": CHECK, "reference": CHECK, "answer": SCORES, "row": SCORES, "compare": SCORES,
}
TEXT_CHARACTERS = 4 * 8157  # a text is cut here: the original's 8,157 tokens, at four characters each


def filled(template, values):
    """The template with its {places} filled in one pass: braces in a value stay as they are."""
    return re.sub("{(" + "|".join(values) + ")}", lambda place: values[place[1]], template) if values else template


def version(stage):
    """"2-1a2b3c4d": the version of a stage's rules, and eight digits of the hash of its prompts, if it has any, with
    their schemas, parameters and names. Every row names them."""
    asked = PROMPTS.get(stage, {})
    parts = [asked, [[name, schema_of(name), PARAMETERS.get(name)] for name in sorted(asked)],
             *([DEPARTMENTS] if stage == "classify" else [])]
    return str(RULES[stage]) + (f"-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]}" if asked else "")

# ----- replies -------------------------------------------------------------------------------------------------------


def name_of(reply, names):
    """The one of `names` that a reply is, but for white space around it; anything else is "unknown"."""
    reply = (reply or "").strip()
    return reply if reply in names else UNKNOWN


def texts_under(value, keys):
    """The texts under `keys` of a JSON reply without white space around them; None unless all are there."""
    found = [value.get(key) for key in keys] if isinstance(value, dict) else [None]
    return [text.strip() for text in found] if all(isinstance(t, str) and t.strip() for t in found) else None


def questions_of(value):
    """The two questions of a JSON reply; None unless they are two that differ."""
    found = texts_under(value, ("question_1", "question_2"))
    return found if found and found[0] != found[1] else None


def scores_of(value, names=("quality", "difficulty", "relevance")):
    """{name: whole number in its range, or None where the reply has none}, of a JSON reply or None."""
    found = {}
    for name in names:
        score, (low, high) = value.get(name) if isinstance(value, dict) else None, RANGES[name]
        found[name] = int(score) if type(score) in (int, float) and score in range(low, high + 1) else None  # 8.0 is 8
    return found


def mention_of(value):
    """Whether a question mentions case details, by the JSON reply; None if it does not say."""
    said = value.get("mentions_case_details") if isinstance(value, dict) else None
    return said if isinstance(said, bool) else None


def answers_of(value):
    """The answers of a JSON reply, one if both are the same; None unless both are there."""
    found = texts_under(value, ("answer_1", "answer_2"))
    return found and list(dict.fromkeys(found))


def trace_of(text, thought):
    """A reply as "## Thought … ## Summarization …"; None if it has no thought or no finished answer.

    `thought` is the reasoning that the server gives apart, or None: then the text has it.
    """
    of_text, answer = split_thought(text or "")
    thought = (thought or of_text or "").strip()
    if not thought or not answer or "## Thought" in answer:
        return None
    return with_thought({"reasoning": thought}, answer)

# ----- the choice ----------------------------------------------------------------------------------------------------


def choose(questions, number):
    """(index of the question that is kept or None, the rule that decided), by FineMedLM-o1's rules in their order.

    1. A question that mentions case details is out; if all do, the text is dropped; if one is left, it is kept.
    2. A question with a missing score loses; if all have one, the text is dropped.
    3. The largest quality + difficulty + relevance; of equal ones the largest quality + difficulty, then quality.
    4. A tie at random: `number(i)` is a random number for question i.

    questions: dicts with quality, difficulty, relevance (a number or None) and mentions (True, False or None, which
    counts as False). By rule 1 a question without scores may be kept.
    """
    left = [i for i, one in enumerate(questions) if not one["mentions"]]
    if not left:
        return None, "case details"
    if len(left) == 1 < len(questions):
        return left[0], "case details of the other"
    scored = [i for i in left if None not in (questions[i][name] for name in ("quality", "difficulty", "relevance"))]
    if not scored:
        return None, "no scores"
    if len(scored) == 1:
        return scored[0], "the only one" if len(questions) == 1 else "no scores of the other"
    rules = {"sum": ("quality", "difficulty", "relevance"), "quality + difficulty": ("quality", "difficulty"),
             "quality": ("quality",)}
    for rule, names in rules.items():
        sums = {i: sum(questions[i][name] for name in names) for i in scored}
        scored = [i for i in scored if sums[i] == max(sums.values())]
        if len(scored) == 1:
            return scored[0], rule
    return min(scored, key=number), "random"
