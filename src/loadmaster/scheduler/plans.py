"""Who is about to feed what: the prompts of the running requests, before they are in cells.

Of several requests that begin with the same tokens, the first in rank feeds them; the others wait
until it has, and share its cells.
"""

from loadmaster.scheduler.prefix import PrefixTree
from loadmaster.scheduler.request import Request
from loadmaster.scheduler.types import Limits


class Plans:
    """The tokens of running requests that have not sampled yet, by rank."""

    def __init__(self, limits: Limits) -> None:
        self._shared = limits.shared_prefix
        self._tree = PrefixTree()

    def enter(self, request: Request) -> None:
        """A request is going to feed its tokens."""
        if self._shared:
            scope = request.submitted.prefix_scope
            known = self._tree.match(scope, request.tokens)
            self._tree.begin(request.rank, scope, known)
            if known.n < len(request.tokens):
                self._tree.extend(request.rank, request.tokens[known.n :])

    def leave(self, request: Request) -> None:
        """It has fed them all, or will not: nobody waits for it any more."""
        if request.rank in self._tree:
            self._tree.drop(request.rank)
        request.stops = None

    def before(self, request: Request) -> tuple[int, int]:
        """The first in rank of those before a request that will feed most of the same tokens,
        and how many; its own rank and 0 if there is none. One token it feeds itself."""
        if not self._shared:
            return request.rank, 0
        match = self._tree.match(request.submitted.prefix_scope, request.tokens[:-1])
        return self._tree.earliest(match, request.rank)
