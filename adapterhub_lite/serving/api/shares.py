"""How much of the server each tenant may have in work at once. A tenant is a key, without keys an address.

Counted in prompts, so that one request of 16 prompts weighs as much as 16 requests. A tenant may have `limit` prompts in
work. When `limit` are in work in all, only a tenant with less than its fair share (`limit` over the number of tenants)
gets in, so that whoever fills the server never shuts the others out; twice `limit` is the most there ever is.
Which of them is computed next is the engine's scheduler's business, by tenant too.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from adapterhub_lite.serving.api.auth import Caller
from adapterhub_lite.serving.api.errors import ApiRefusal


class TokenBudget:
    """Tokens a minute, as a bucket that fills evenly. What a request takes is known afterwards: it may go into debt."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._left, self._seen = float(per_minute), now

    def seconds_to_wait(self, now: float) -> float:
        """Seconds until there is something left; 0 when there is."""
        self._left = min(float(self.per_minute), self._left + (now - self._seen) * self.per_minute / 60)
        self._seen = now
        return 0.0 if self._left > 0 else (1 - self._left) * 60 / self.per_minute

    def spend(self, tokens: int) -> None:
        """Take tokens out."""
        self._left -= tokens


class Shares:
    """Prompts in work by tenant. Used on the event loop alone, so without a lock. `clock` gives seconds."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self.in_work: Counter[str] = Counter()
        self._requests: Counter[str] = Counter()
        self._budgets: dict[str, TokenBudget] = {}
        self._clock = clock

    @contextmanager
    def take(self, caller: Caller, prompts: int) -> Iterator[None]:
        """Count `prompts` of one request as in work.

        Raises:
            ApiRefusal: 429 when the tenant must come back later, 400 when so many prompts never fit.
        """
        self._check(caller, prompts)
        tenant = caller.tenant
        self.in_work[tenant] += prompts
        self._requests[tenant] += 1
        try:
            yield
        finally:
            for counts, count in ((self.in_work, prompts), (self._requests, 1)):
                counts[tenant] -= count
                if not counts[tenant]:
                    del counts[tenant]

    def spend(self, caller: Caller, tokens: int) -> None:
        """Take the tokens of an answer out of the caller's minute."""
        if caller.tokens_per_minute is not None:
            self._budget(caller.label, caller.tokens_per_minute).spend(tokens)

    def _check(self, caller: Caller, prompts: int) -> None:
        tenant = caller.tenant
        if prompts > self.limit:
            text = f"The request has {prompts} prompts, this server computes at most {self.limit} at once. Split it."
            raise ApiRefusal(400, text, "too_many_prompts", param="prompt")
        own, in_all = self.in_work[tenant], self.in_work.total()
        if caller.requests_in_work is not None and self._requests[tenant] >= caller.requests_in_work:
            raise _later(f"This key has {self._requests[tenant]} requests in work, which is its limit.")
        if caller.tokens_per_minute is not None:
            wait = self._budget(caller.label, caller.tokens_per_minute).seconds_to_wait(self._clock())
            if wait:
                raise _later(f"This key has used its {caller.tokens_per_minute} tokens per minute.", wait)
        if own + prompts > self.limit:
            raise _later(f"You have {own} prompts in work; with {prompts} more it is above the limit of {self.limit}.")
        tenants = len(self.in_work.keys() | {tenant})
        within_share = own + prompts <= max(1, self.limit // tenants) and in_all + prompts <= 2 * self.limit
        if in_all + prompts > self.limit and not within_share:
            raise _later(f"{in_all} prompts are in work, the limit is {self.limit}.")

    def _budget(self, label: str, per_minute: int) -> TokenBudget:
        budget = self._budgets.get(label)
        if budget is None or budget.per_minute != per_minute:
            budget = self._budgets[label] = TokenBudget(per_minute, self._clock())
        return budget


def _later(text: str, seconds: float = 1.0) -> ApiRefusal:
    wait = max(1, math.ceil(seconds))
    return ApiRefusal(429, f"{text} Try again in {wait} s.", "too_many_requests", retry_after=wait)
