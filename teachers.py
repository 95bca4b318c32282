"""Teachers: the models that write data, asked over OpenAI's API or run here.

    a call whose key is stored      is not asked again; any other is asked, its reply stored, then handed out
    refused, broken, timed out      is asked again after a pause, so often and so long (`Server.answer`)
    no server, a key or a model     that is refused: all calls would fail alike, so an InputError ends the run, and none
                                    of them is stored as failed

gate.py says how many are in flight, `calls.dialogue` what counts as a reply; a model run here obeys the second too. The
client is the `openai` package without its own retries (extra `synth`). The key comes from OPENAI_API_KEY and goes
nowhere else.

    store = Store("runs/synth/calls.sqlite")
    teacher = Teacher.open("http://localhost:8000/v1", store)              # or "local:models/smollm2-135m-instruct"
    for index, reply in teacher.ask(Call(({"role": "user", "content": text},), {"max_tokens": 64}) for text in texts):
        print(index, reply.text or reply.failure)
"""
import asyncio
import atexit
import importlib
import ipaddress
import json
import logging
import math
import queue
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from email.utils import parsedate_to_datetime
from types import SimpleNamespace
from urllib.parse import urlsplit

from calls import (
    MAX_REPLY_BYTES,
    UNFINISHED,
    Reply,
    api_key,
    canonical,
    dialogue,
    failed,
    json_in,
    key_of,
    read_completion,
    redact,
    response_format,
)
from files import InputError, one_line
from gate import Gate
from local import Local

TRIES = 5  # requests of one call that may fail; refusals do not count, only time bounds them
BACKOFF = (0.5, 30.0)  # seconds: the first pause before a retry, which doubles, and the longest
CONNECT = 30.0  # seconds in which a server takes a connection, or is not there
BUSY, PASSING = (429, 503, 529), (408, 409, 425)  # refusals; what another try may mend, as it may any 5xx but 501
NO_ENTRY = (401, 402, 404)  # a wrong key, no credit, a wrong address or model: the same for all calls

# ----- a server ------------------------------------------------------------------------------------------------------


class Again(Exception):
    """A request that may be sent again: why, its outcome, and the server's Retry-After in seconds.

    The outcome is "refused", "timed out", "broken", or "away": nobody was there to take the request.
    """

    def __init__(self, why, outcome="broken", retry_after=0.0):
        super().__init__(why)
        self.outcome, self.retry_after = outcome, retry_after


class Server:
    """A server of OpenAI's API. One thread asks (an event loop), another stores what came; `begin` and `finished` serve
    the caller's thread, so that a caller who is slow, or gone, delays nothing and loses nothing."""

    def __init__(self, url, store, model, *, concurrency, timeout, patience):
        self.url, self.store, self.timeout, self.patience = url, store, timeout, patience
        self.counts, self.window, self.gate = Counter(), 2 * concurrency, Gate(concurrency)
        self.sessions, self.in_flight, self.answered = [], set(), False
        self.forms = {}  # {schema: the form that the server takes}
        self.unsaved, self.loop = queue.SimpleQueue(), asyncio.new_event_loop()
        self.client, self.openai, self.nobody = open_client(url, concurrency, timeout)
        self.threads = [threading.Thread(target=run, daemon=True) for run in (self.loop.run_forever, self.save)]
        for thread in self.threads:
            thread.start()
        atexit.register(self.close)
        try:
            self.model = model or self.run(self.only_model())
        except BaseException:
            self.close()
            raise

    def run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def only_model(self):
        """The name of the one model that the server has."""
        try:
            async with asyncio.timeout(min(self.timeout, 60)):
                raw = await self.client.models.with_raw_response.list()
            names = [one["id"] for one in json.loads(raw.http_response.content)["data"]]
        except (self.openai.APIError, TimeoutError) as error:
            why = one_line(redact(str(error.__cause__ or error)))[:200] or "no answer in time"
            raise InputError(f"{self.url}: found no list of models ({why}); expected a server of OpenAI's "
                             "API") from None
        except (ValueError, LookupError, TypeError, RecursionError):
            names = [None]
        if not all(isinstance(name, str) and name == redact(name) for name in names):
            raise InputError(f"{self.url}: found no list of models; expected a server of OpenAI's API")
        if len(names) != 1:
            raise InputError(f"{self.url}: found the models {', '.join(names[:9])[:300] or 'none'}; expected one, or a "
                             "name beside the address, as by --teacher-model")
        return names[0]

    # --- the caller's thread

    def session(self):
        self.sessions.append(session := SimpleNamespace(done=queue.SimpleQueue(), tasks=set(), stopped=False))
        return session

    def begin(self, session, key, call, stored):
        asyncio.run_coroutine_threadsafe(self.converse(session, key, call, stored), self.loop)

    def finished(self, session, wait):
        """The replies that were stored since the last time, at least one with `wait`."""
        replies = [session.done.get()] if wait else []
        while not session.done.empty():
            replies.append(session.done.get())
        for reply in replies:
            if isinstance(reply, BaseException):
                raise reply
        return replies

    def end(self, session):
        """Sends nothing more for a session, waits for its requests in flight and stores their replies."""
        if session not in self.sessions:
            return
        try:
            self.run(self.drain(session))
            self.unsaved.put((saved := queue.SimpleQueue(), None))
            saved.get()
            self.finished(session, wait=False)  # raises where a reply could not be stored
        except BaseException:  # a second Ctrl-C
            self.loop.call_soon_threadsafe(lambda: [task.cancel() for task in session.tasks])
            raise
        finally:
            self.sessions.remove(session)

    def close(self):
        """Ends what runs, as `end` does, and the threads."""
        atexit.unregister(self.close)
        for session in list(self.sessions):
            self.end(session)
        if not self.loop.is_closed():
            self.run(self.client.close())
            self.unsaved.put(None)
            self.loop.call_soon_threadsafe(self.loop.stop)
            for thread in self.threads:
                thread.join()
            self.loop.close()

    # --- the thread that stores

    def save(self):
        """Stores replies, all that have come during one flush of the disk with the next, and hands them out."""
        while item := self.unsaved.get():
            batch = [item]
            while not self.unsaved.empty() and len(batch) < 256:
                batch.append(self.unsaved.get())
            ended = None in batch
            batch = [item for item in batch if item]
            try:
                self.store.put(*[reply for _, reply in batch if isinstance(reply, Reply)])
            except Exception as error:
                batch = [(box, error) for box, _ in batch]
            for box, reply in batch:
                box.put(reply)
            if ended:
                return

    # --- the thread that asks

    async def drain(self, session):
        session.stopped = True
        flying = session.tasks & self.in_flight
        for task in session.tasks - flying:
            task.cancel()
        if flying:
            print(f"waiting for {len(flying)} calls in flight, whose replies are kept; Ctrl-C gives them up",
                  file=sys.stderr)
        if session.tasks:
            await asyncio.wait(session.tasks)

    async def converse(self, session, key, call, answer):
        """Asks until `dialogue` has the reply to a call; `answer` is a first answer that is known already, or None."""
        session.tasks.add(task := asyncio.current_task())
        try:
            talk = dialogue(key, call, self.counts)
            request = next(talk)
            while True:
                answer = answer or await self.answer(session, key, *request, call.schema)
                try:
                    request, answer = talk.send(answer), None
                except StopIteration as end:
                    self.unsaved.put((session.done, end.value))
                    return
        except Exception as error:  # the caller's thread raises it
            self.unsaved.put((session.done, error))
        finally:
            session.tasks.discard(task)

    async def answer(self, session, key, messages, parameters, schema):
        """The one policy of retries: a Reply, or after TRIES failures or `patience` seconds one with the failure.

        Refusals, and the absence of a server that has answered before, are no failures: only time bounds them.
        """
        sent = tries = 0
        first, last, loop = None, None, self.loop
        form = None if schema is None else "json_schema"  # how the schema is given; None: not
        while True:
            if session.stopped:
                raise asyncio.CancelledError
            entered = await self.gate.enter(again=first is not None)
            first = entered if first is None else first
            form = form and self.forms.get(canonical(schema), form)
            body = {**parameters, "response_format": response_format(schema, form)} if form else parameters
            seconds = max(0.0, min(self.timeout, first + self.patience - loop.time()))
            outcome, wait = "unasked", 0.0
            self.in_flight.add(asyncio.current_task())
            try:
                async with asyncio.timeout(seconds):
                    reply, status = await self.post(key, messages, body)
                outcome = "answered" if status == 200 else "denied"
            except TimeoutError:
                outcome, late = "timed out", Again(f"no whole reply within {seconds:.1f} s")
                last = last if last and seconds < self.timeout else late
            except Again as error:
                last, outcome, wait = error, error.outcome, error.retry_after
            finally:
                self.in_flight.discard(asyncio.current_task())
                self.gate.leave(entered, outcome, wait if wait <= self.patience else 0.0)
            self.answered = self.answered or outcome != "away"
            if outcome == "denied" and form and status in (400, 422, 500, 501):
                # The server may not know the form: if the same call succeeds without, it does not. One that names
                # json_object, as llama-cpp-python does, takes the schema there.
                form = "json_object" if form == "json_schema" and "json_object" in reply.failure else None
                continue
            if outcome in ("answered", "denied"):
                if schema is not None and status == 200:
                    self.forms[canonical(schema)] = form
                return reply
            self.counts[outcome] += 1
            sent, tries = sent + 1, tries + (outcome != "refused" and not (outcome == "away" and self.answered))
            pause = min(BACKOFF[1], BACKOFF[0] * 2 ** min(sent - 1, 30)) * random.uniform(0.5, 1)
            pause = max(pause, wait * random.uniform(1, 1.1))
            if tries >= TRIES or loop.time() + pause > first + self.patience:
                if last.outcome == "away":
                    raise InputError(f"{self.url}: {last}; expected a server of OpenAI's API")
                asks = f"; it asks to wait {wait:,.0f} s" if wait else ""
                return failed(key, f"{last}{asks}; given up after {loop.time() - first:.0f} s")
            await asyncio.sleep(pause)

    async def post(self, key, messages, body):
        """(Reply, HTTP status) of one request; raises Again where it is worth another, InputError where no call is."""
        self.counts["requests"] += 1
        try:
            raw = await self.client.chat.completions.with_raw_response.create(
                model=self.model, messages=messages, extra_body=body)
            return read_completion(key, json.loads(raw.http_response.content)), 200
        except self.openai.APIStatusError as error:
            response, status = error.response, error.status_code
        except self.openai.OpenAIError as error:
            why = redact(one_line(error.__cause__ or error)) or type(error.__cause__).__name__
            raise Again(why, "away" if isinstance(error.__cause__, self.nobody) else "broken") from None
        except (ValueError, RecursionError) as error:
            raise Again(f"the reply is broken: {one_line(redact(str(error)))}") from None
        if 300 <= status < 400:
            return failed(key, f"{status}: a redirect to {urlsplit(response.headers.get('location', '')).netloc!r}, "
                               "which is not followed"), status
        try:
            fault = json.loads(response.content)
            fault = fault.get("error", fault)
            said, code = fault.get("message", fault), fault.get("code")
        except (ValueError, AttributeError, RecursionError):
            said, code = response.text, None
        why = f"{status}: {one_line(redact(str(said)))[:300]}"
        if status in NO_ENTRY or code == "insufficient_quota":
            raise InputError(f"{self.url}, model {self.model}: {why}; expected a server that takes this model's name "
                             "and the key in OPENAI_API_KEY")
        foreign = "response_format" in body and "response_format" in why  # 500 in llama-cpp-python
        if status in BUSY or status in PASSING or (status >= 500 and status != 501 and not foreign):
            raise Again(why, "refused" if status in BUSY else "broken", retry_after(response.headers))
        return failed(key, why), status


def retry_after(headers):
    """The seconds to wait by the header Retry-After (seconds or a date) or retry-after-ms; 0 without one."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1)):
        text = headers.get(name, "")
        try:
            seconds = float(text) * scale
        except ValueError:
            try:
                seconds = parsedate_to_datetime(text).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError):
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return 0.0


def open_client(url, concurrency, timeout):
    """(AsyncOpenAI, its module, the errors of a server that is not there): a client without retries of its own, without
    redirects and proxies, with bounded replies."""
    try:
        import openai
    except ImportError:
        raise InputError(f"{url}: found no openai to ask a server; expected pip install -e '.[synth]'") from None
    package = openai.DefaultAsyncHttpxClient.__base__.__module__.partition(".")[0]  # httpx2, in older versions httpx
    httpx = importlib.import_module(package)
    for name in ("openai", package, package.replace("httpx", "httpcore")):
        logging.getLogger(name).setLevel(logging.WARNING)  # below they write headers, in which a server may echo a key

    class Bounded(httpx.AsyncHTTPTransport):
        async def handle_async_request(self, request):
            response, body = await super().handle_async_request(request), bytearray()
            try:
                if response.headers.get("content-encoding", "identity") != "identity":
                    raise httpx.DecodingError("a compressed reply; expected a plain one, as asked for")
                async for piece in response.stream:
                    body += piece
                    if len(body) > MAX_REPLY_BYTES:
                        raise httpx.ReadError(f"a reply of more than {MAX_REPLY_BYTES:,} bytes")
            finally:
                await response.aclose()
            kept = ("content-type", "location", "retry-after", "retry-after-ms")
            return httpx.Response(response.status_code, content=bytes(body), headers={
                name: response.headers[name] for name in kept if name in response.headers})
    key = api_key()
    if not key.isascii() or not key.isprintable():
        raise InputError("OPENAI_API_KEY: found characters that no HTTP header holds; expected a key")
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    transport = Bounded(limits=limits, trust_env=False)  # a given transport also keeps proxies out
    http = openai.DefaultAsyncHttpxClient(transport=transport, follow_redirects=False,
                                          timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT)))
    client = openai.AsyncOpenAI(api_key=key or "none", base_url=url, max_retries=0, http_client=http,
                                default_headers={"Accept-Encoding": "identity"})
    return client, openai, (httpx.ConnectError, httpx.ConnectTimeout)

# ----- a teacher -----------------------------------------------------------------------------------------------------


class Teacher:
    """A model that answers calls, each once: `model` is its name, `counts` says how often what happened."""

    def __init__(self, store, pool, retry_failed=False):
        self.store, self.pool, self.retry_failed = store, pool, retry_failed
        self.model, self.counts = pool.model, pool.counts

    @classmethod
    def open(cls, spec, store, *, model=None, concurrency=256, allow_remote=False, timeout=600.0, patience=3600.0,
             retry_failed=False, batch_size=16, device="auto", dtype="bf16"):
        """The teacher at a URL of OpenAI's API ("http://localhost:8000/v1") or in a folder ("local:DIR").

        `model` None takes the only one that a server has. At most `concurrency` requests are in flight, each for at
        most `timeout` seconds, and a call with its retries takes at most `patience`. With `retry_failed` calls whose
        failure is stored are asked again. `batch_size`, `device` and `dtype` are of a folder's model. InputError for a
        server that is not on this machine without `allow_remote`.
        """
        if spec.startswith("local:"):
            pool = Local(spec.removeprefix("local:"), store, model, batch_size=batch_size, device=device, dtype=dtype)
        else:
            check_url(spec, allow_remote)
            pool = Server(spec, store, model, concurrency=concurrency, timeout=timeout, patience=patience)
        return cls(store, pool, retry_failed)

    def ask(self, calls):
        """Yields (number of the call, Reply) for every call of an iterable, in order of completion.

        Stored replies are not asked again, nor is one call twice at the same time. Calls are read as there is room for
        them, and every reply is on the disk before it is yielded. When the caller stops, by Ctrl-C too, nothing more is
        sent, and the replies to what is in flight are waited for and stored.
        """
        waiting, held, session = {}, 0, self.pool.session()  # waiting: {key: the numbers of its calls}
        try:
            for number, call in enumerate(calls):
                key = key_of(self.model, call)
                self.counts["calls"] += 1
                reply, unfinished = (None, None) if key in waiting else self.stored(key, call)
                if reply:
                    self.counts["stored"] += 1
                    yield number, reply
                    continue
                if key not in waiting:
                    self.pool.begin(session, key, call, unfinished)
                waiting.setdefault(key, []).append(number)
                held += 1
                for reply in self.pool.finished(session, wait=held >= self.pool.window):
                    held -= len(numbers := waiting.pop(reply.key))
                    yield from self.counted(reply, numbers)
            while waiting:
                for reply in self.pool.finished(session, wait=True):
                    yield from self.counted(reply, waiting.pop(reply.key))
        finally:
            self.pool.end(session)

    def counted(self, reply, numbers):
        self.counts["repaired"] += reply.repaired
        self.counts["failed"] += reply.failure is not None
        return [(number, reply) for number in numbers]

    def stored(self, key, call):
        """(the stored Reply, None), or (None, the unfinished Reply from which to go on, or None)."""
        reply = self.store.get(key)
        if reply is None or (reply.failure and reply.failure != UNFINISHED):
            return (None if self.retry_failed else reply), None
        if reply.failure:
            return None, replace(reply, failure=None)
        if call.schema is not None:
            try:
                json_in(reply.text, call.schema)
            except InputError:  # imported: import_batch knows no schema
                return None, reply
        return reply, None

    def close(self):
        """Ends what still runs; at the end of the program it is called by itself."""
        self.pool.close()


def check_url(url, allow_remote=False):
    """InputError for what is no URL of a server, or of one on another machine: texts may be private."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts = host = None
    if not host or parts.scheme not in ("http", "https") or parts.query or parts.fragment or "@" in parts.netloc:
        raise InputError("the teacher's address: found no plain URL; expected http://HOST:PORT/v1, without a password, "
                         "or local:DIR")
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not allow_remote:
        raise InputError(f"{host}: found another machine, to which the texts would go; expected localhost, or "
                         "--allow-remote")
