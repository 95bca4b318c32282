"""How many requests may be in flight at a server that does not say how many it takes.

    flying <= L
    at the first refusal (429, 503) of a burst   L <- 0.9 L, and C <- the L that was refused
    at a reply while all places are taken        L <- L + 1 before any refusal, L + 1/8 while L < C - 1, then L + 1/128

It is TCP's additive increase and multiplicative decrease (Chiu and Jain, 1989), slow where refusals begin. A server of
48 places was used to 95 %. A refusal's Retry-After shuts the gate for that long, or until a reply shows that there is
room again. teachers.py sends through it.
"""
import asyncio
import math
from collections import deque


class Gate:
    """Used within one event loop: `entered = await gate.enter()`, send, `gate.leave(entered, outcome)`."""

    def __init__(self, most):
        self.limit, self.most, self.ceiling, self.flying = float(min(8, most)), most, None, 0
        self.cut_at, self.shut_until, self.turns = -math.inf, -math.inf, deque()

    async def enter(self, again=False):
        """Waits for a place, one that comes `again` before the others; returns the time."""
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        (self.turns.appendleft if again else self.turns.append)(turn)
        self.let_in()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it had been let in
                self.flying -= 1
                self.let_in()
            raise
        return loop.time()

    def leave(self, entered, outcome, retry_after=0.0):
        """Gives the place back. The outcome is "answered", "refused", "timed out" or another, which says nothing."""
        loop = asyncio.get_running_loop()
        full = self.flying >= int(self.limit)
        self.flying -= 1
        if outcome in ("refused", "timed out"):
            if entered > self.cut_at:  # sent after the last cut: a new burst
                self.cut_at = loop.time()
                self.ceiling = int(self.limit) if outcome == "refused" else self.ceiling
                self.limit = max(1.0, min(0.9 * self.limit, self.limit - 1))
            self.shut_until = max(self.shut_until, loop.time() + retry_after)
            loop.call_later(retry_after, self.let_in)
        elif outcome == "answered":
            self.shut_until = -math.inf
            if full:
                step = 1 if self.ceiling is None else 1 / 8 if self.limit < self.ceiling - 1 else 1 / 128
                self.limit = min(self.most, self.limit + step)
        self.let_in()

    def let_in(self):
        open_now = asyncio.get_running_loop().time() >= self.shut_until
        while self.turns and open_now and self.flying < int(self.limit):
            turn = self.turns.popleft()
            if not turn.done():
                turn.set_result(None)
                self.flying += 1
