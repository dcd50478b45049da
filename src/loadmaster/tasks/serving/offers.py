"""Which models a server offers, and under which ids."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from loadmaster.errors import NotFoundError, UsageError
from loadmaster.model import store
from loadmaster.model.reference import PathReference, parse_reference
from loadmaster.tasks.locating import locate
from loadmaster.tasks.planning import DEMO
from loadmaster.tasks.serving.types import Offer

_MOST_DIGITS = 9
_ALIAS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._:/@-]{0,199}")


class Offers:
    """The models of one server. A client's word is looked up here and never becomes a path."""

    def __init__(self, offers: Sequence[Offer]) -> None:
        self._by_id = {offer.id: offer for offer in offers}

    def __iter__(self) -> Iterator[Offer]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def find(self, name: str | None) -> Offer:
        """The model a client means; without a name, the first one.

        Raises:
            NotFoundError: there is none of this name; the message has the nearest ones.
        """
        if not name and self._by_id:
            return next(iter(self._by_id.values()))
        for wanted in (name or "", (name or "").removesuffix(":latest")):
            if wanted in self._by_id:
                return self._by_id[wanted]
        raise self._unknown(name)

    def _unknown(self, name: str | None) -> NotFoundError:
        ids = list(self._by_id)
        near = difflib.get_close_matches(name or "", ids, n=3, cutoff=0.3) or ids[:3]
        shown = ", ".join(f"`{one}`" for one in near)
        error = NotFoundError(
            f"there is no model `{(name or '')[:200]}` here",
            hint=f"there is {shown}" if near else "none is offered",
        )
        error.code = "model_not_found"
        return error


def read_offers(models: Sequence[str], embedders: Sequence[str] = ()) -> Offers:
    """The models of the command line, `MODEL` or `ID=MODEL`; without any, those that are here.

    `embedders` are opened for vectors, whatever their header says.

    Raises:
        NotFoundError: one is not on this machine.
        UsageError: two have the same id.
    """
    offers = [_offer(text) for text in models] if models or embedders else list(_local())
    offers += [replace(_offer(text), embeds=True) for text in embedders]
    ids = [offer.id for offer in offers]
    for double in (one for one in ids if ids.count(one) > 1):
        raise UsageError(
            f"two models would have the id `{double}`", hint=f"name one: `my-id={double}`"
        )
    for offer in offers if models or embedders else ():
        locate(offer.model)
    return Offers(offers)


def with_contexts(offers: Offers, texts: Sequence[str]) -> Offers:
    """The same models, some with an n_ctx of their own: `ID=N`.

    Raises:
        NotFoundError: there is no model of this id.
        UsageError: what follows it is no number of tokens.
    """
    known = {offer.id: offer for offer in offers}
    for text in texts:
        name, _, number = text.rpartition("=")
        if not name or not number.isdecimal() or len(number) > _MOST_DIGITS or not int(number):
            raise UsageError(f"`{text}` is not `ID=N`", hint="as in `--model-ctx coder=4096`")
        offer = offers.find(name)
        known[offer.id] = replace(offer, n_ctx=int(number))
    return Offers(list(known.values()))


def _offer(text: str) -> Offer:
    alias, separator, model = text.partition("=")
    if separator and model and not Path(text).expanduser().exists():
        if not _ALIAS.fullmatch(alias):
            raise UsageError(f"`{alias}` cannot be the id of a model", hint="write `ID=MODEL`")
        return Offer(id=alias, model=model)
    return Offer(id=default_id(text), model=text)


def default_id(model: str) -> str:
    """How clients name a model whose user gave it no id."""
    if model == DEMO:
        return DEMO
    reference = parse_reference(model)
    if isinstance(reference, PathReference):
        return Path(reference.path).stem
    return str(reference).partition(":")[2] or str(reference)


def _local() -> Iterable[Offer]:
    """The packaged model and what Ollama has."""
    yield Offer(id=DEMO, model=DEMO)
    for name in store.ollama_names():
        yield Offer(id=default_id(name), model=name)
