"""The gate at a simulated server, whose time passes only when nothing is left to do."""
import asyncio
import random
import selectors

import pytest

from gate import Gate


def in_loop(main):
    """Runs a coroutine function with a Gate of at most 64 whose limit is 10."""
    async def run():
        gate = Gate(64)
        gate.limit = 10.0
        return await main(gate)
    return asyncio.run(run())


@pytest.mark.parametrize("outcome, limit, ceiling", [("refused", 9.0, 10), ("timed out", 9.0, None),
                                                     ("broken", 10.0, None), ("answered", 10.0, None)])
def test_what_an_outcome_does_to_the_limit(outcome, limit, ceiling):
    async def main(gate):
        gate.leave(await gate.enter(), outcome)
        assert (gate.limit, gate.ceiling, gate.flying) == (limit, ceiling, 0)
    in_loop(main)


def test_a_request_that_comes_again_goes_first_and_one_that_leaves_frees_its_place():
    async def main(gate):
        gate.limit, order = 1.0, []

        async def enter(name, again):
            await gate.enter(again)
            order.append(name)
        entered = await gate.enter()
        waiting = [asyncio.create_task(enter(name, name == "again")) for name in ("new", "again", "last")]
        await asyncio.sleep(0)
        gate.leave(entered, "broken")  # lets "again" in, which is cancelled before it knows
        waiting[1].cancel()
        await asyncio.sleep(0.01)
        assert order == ["new"] and gate.flying == 1
        gate.leave(entered, "broken")
        await asyncio.wait(waiting)
        assert order == ["new", "last"] and gate.flying == 1
        waiting = [asyncio.create_task(enter(name, name == "again")) for name in ("new", "again")]
        await asyncio.sleep(0)
        gate.leave(entered, "broken")
        await asyncio.sleep(0.01)
        assert order[2:] == ["again"]
        waiting[0].cancel()
    in_loop(main)


class Clock:
    """A selector of an event loop whose time passes only when nothing is left to do."""

    def __init__(self):
        self.now, self.inner = 0.0, selectors.SelectSelector()

    def select(self, timeout):
        self.now += timeout or 0
        return self.inner.select(0)

    def __getattr__(self, name):
        return getattr(self.inner, name)


@pytest.mark.parametrize("places, jitter", [(48, 0.0), (48, 0.5), (6, 0.5)])
def test_ninety_percent_of_what_a_server_takes_is_used_and_few_are_refused(places, jitter):
    """A server that answers in a second and refuses more than `places` at once, for five minutes of simulated time."""
    rng, clock = random.Random(0), Clock()
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = lambda: clock.now
    busy, done, refused = 0, [], []

    async def client(gate):
        nonlocal busy
        while clock.now < 300:
            entered = await gate.enter()
            if busy == places:
                await asyncio.sleep(0.002)
                refused.append(clock.now)
                gate.leave(entered, "refused", retry_after=1.0)
                await asyncio.sleep(1.0)
                continue
            busy += 1
            await asyncio.sleep(1 + jitter * (rng.random() - 0.5))
            busy -= 1
            done.append(clock.now)
            gate.leave(entered, "answered")

    async def main():
        gate = Gate(256)
        await asyncio.gather(*(client(gate) for _ in range(512)))
    loop.run_until_complete(main())
    loop.close()
    done, refused = (sum(60 <= at < 300 for at in times) for times in (done, refused))
    assert done > 0.95 * 240 * places and refused < 0.02 * done, (done / 240 / places, refused / done)
