"""The memory and the throughput of a whole `synth.py run`, filter and judge too, against a scripted server on loopback.

    python bench/synth.py memory --texts 1000 5000 10000     peak memory of runs over so many texts; replies at once
    python bench/synth.py throughput --texts 1500            a server that answers in 1 s and refuses more than 48

The corpus is made of random sentences, so that the filter drops next to none of it; questions and answers are made of
them too, each a function of its request alone. The server is a process of its own: its memory is not in the figures.
`throughput` gives the share of the server's 48 replies a second that the run used from the first minute to its last
reply, the ends of all stages included, the share in its best minute, and the refusals among all requests.
"""
import asyncio
import bisect
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from files import Parser, number, run_main, whole  # noqa: E402

SECONDS, PLACES, SETTLED = 1.0, 48, 60  # of a reply; at once; seconds that the adaptation has
NOUNS = """patient child kidney liver artery vein nerve muscle fever tumor lesion infection seizure fracture ulcer rash
anemia stroke asthma sepsis diabetes insulin antibiotic steroid vaccine biopsy scan dose therapy relapse remission
enzyme receptor hormone antibody platelet lymphocyte bone marrow spleen pancreas thyroid airway lung heart valve murmur
rhythm pressure perfusion edema effusion abscess hernia stone cyst polyp graft transplant dialysis catheter surgeon
nurse clinic ward trial cohort outcome risk symptom diagnosis""".split()  # noqa: SIM905
ADJECTIVES = """acute chronic severe mild early late recurrent bilateral renal hepatic cardiac pulmonary viral bacterial
autoimmune genetic rare common elderly young pregnant febrile stable unstable benign malignant primary secondary
proximal distal systemic local persistent transient""".split()  # noqa: SIM905
VERBS = """increases reduces predicts follows precedes worsens relieves complicates suggests excludes delays prevents
mimics causes requires supports limits improves""".split()  # noqa: SIM905


def sentence(rng):
    noun, adjective = lambda: rng.choice(NOUNS), lambda: rng.choice(ADJECTIVES)
    return (f"The {adjective()} {noun()} of the {noun()} {rng.choice(VERBS)} the {adjective()} {noun()} in "
            f"{rng.randint(2, 98)} percent of the cases with {adjective()} {noun()} and {noun()}.")


def prose(rng, sentences):
    return " ".join(sentence(rng) for _ in range(sentences))

# ----- the server ----------------------------------------------------------------------------------------------------


def reply_to(request):
    """The text with which the server answers: what the prompt asks for, made of random sentences."""
    rng = random.Random(json.dumps([request["messages"], request.get("seed")]))
    asked = request["messages"][-1]["content"]
    schema = request.get("response_format", {"json_schema": {"schema": {"properties": {}}}})["json_schema"]["schema"]
    made = {}
    for name, kind in schema["properties"].items():
        if name.startswith("question_"):
            made[name] = f"Why does it matter that {sentence(rng)[:-1].lower()}?"
        elif kind.get("type") == "boolean":
            made[name] = rng.random() < 0.1
        elif kind.get("type") == "integer":
            made[name] = rng.randint(kind["minimum"] + 4 * (name != "relevance"), kind["maximum"])
        else:
            made[name] = prose(rng, 6)
    if made:
        return json.dumps(made)
    for mark in ("The departments:\n", "The shelves:\n"):
        if mark in asked:
            return rng.choice(asked.partition(mark)[2].partition("\n\n")[0].splitlines())
    if "## Summarization" in asked:
        return f"## Thought\n{prose(rng, 30)}\n\n## Summarization\n{prose(rng, 6)}"
    return prose(rng, 4)


async def serve(seconds, places):
    """Answers until it is terminated; then writes [[time, refused], …] of all replies as one line of JSON."""
    busy, log, ended = 0, [], asyncio.Event()

    async def respond(reader, writer):
        nonlocal busy
        while await reader.readline():
            length = 0
            while (field := await reader.readline()).strip():
                if field.lower().startswith(b"content-length:"):
                    length = int(field.partition(b":")[2])
            request, status, extra = json.loads(await reader.readexactly(length)), "200 OK", ""
            if busy >= places:
                status, extra, body = "429 Too Many Requests", f"retry-after: {seconds}\r\n", {}
            else:
                busy += 1
                await asyncio.sleep(seconds)
                busy -= 1
                text = reply_to(request)
                body = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
                        "usage": {"prompt_tokens": length // 4, "completion_tokens": len(text) // 4}}
            log.append((time.monotonic(), status[0] == "4"))
            body = json.dumps(body).encode()
            writer.write(f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n{extra}"
                         f"content-length: {len(body)}\r\n\r\n".encode() + body)
            await writer.drain()
        writer.close()
    server = await asyncio.start_server(respond, "127.0.0.1", 0, limit=1 << 20)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print(server.sockets[0].getsockname()[1], flush=True)
    await ended.wait()
    print(json.dumps(log), flush=True)

# ----- a run ---------------------------------------------------------------------------------------------------------


def measured(texts, seconds, places):
    """Runs synth.py over so many texts; what it took, its counts, and the log of the server."""
    with tempfile.TemporaryDirectory() as folder:
        folder, rng = Path(folder), random.Random(0)
        with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
            for i in range(texts):
                file.write(json.dumps({"text": prose(rng, 10), "url": f"page/{i}"}) + "\n")
        command = [sys.executable, __file__, "serve", "--seconds", str(seconds), "--places", str(places)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            url = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"
            command = [sys.executable, str(ROOT / "synth.py"), "run", "--corpus", str(folder / "corpus.jsonl"),
                       "--teacher", url, "--teacher-model", "teacher", "--judge", url, "--judge-model", "judge",
                       "--out", str(folder / "out"), "--json"]
            began = time.monotonic()
            run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            said = run.stderr.read().decode()
            _, status, usage = os.wait4(run.pid, 0)  # of this run alone; RUSAGE_CHILDREN has the largest of all
            run.returncode, took = os.waitstatus_to_exitcode(status), time.monotonic() - began
            server.terminate()
            log = json.loads(server.stdout.readline())
        if run.returncode:
            sys.exit(f"synth.py ended with status {run.returncode}: {said[-2000:]}")
        manifest = json.loads((folder / "out/manifest.json").read_text(encoding="utf-8"))
    calls = sum(model["calls"] for model in manifest["models"].values())
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {"texts": texts, "written": manifest["stages"]["filter"]["out"], "calls": calls,
            "failed": manifest["failed"], "seconds": round(took, 1), "peak_mb": round(peak)}, log


def best_minute(log):
    """The most replies that were given within 60 s: how much of the server is used within a stage."""
    times = [at for at, refused in log if not refused]
    return max(bisect.bisect_right(times, at + 60) - i for i, at in enumerate(times))


def main():
    parser = Parser(prog="synth.py", description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("memory", "throughput", "serve"))
    parser.add_argument("--texts", type=whole(1), nargs="+", help="(default: 1000 5000 10000; throughput: 1500)")
    parser.add_argument("--seconds", type=number(0), default=SECONDS, help="of a reply (default: %(default)s)")
    parser.add_argument("--places", type=whole(1), default=PLACES, help="calls at once (default: %(default)s)")
    args = parser.parse_args()
    if args.command == "serve":
        asyncio.run(serve(args.seconds, args.places))
    elif args.command == "memory":
        for texts in args.texts or (1000, 5000, 10_000):
            print(json.dumps(measured(texts, 0, 10**6)[0]), flush=True)
    else:
        for texts in args.texts or (1500,):
            found, log = measured(texts, args.seconds, args.places)
            late = [(at, refused) for at, refused in log if at >= log[0][0] + SETTLED]
            answered, refused = (sum(one == kind for _, one in late) for kind in (False, True))
            if not late:
                sys.exit(f"the run ended within {SETTLED} s; expected more --texts")
            span = late[-1][0] - log[0][0] - SETTLED
            used = args.seconds / args.places
            print(json.dumps(found | {"span": round(span, 1), "refused": f"{refused / len(late):.2%}",
                                      "of_capacity": f"{answered * used / span:.1%}",
                                      "best_minute": f"{best_minute(late) * used / 60:.1%}"}), flush=True)


if __name__ == "__main__":
    run_main(main)
