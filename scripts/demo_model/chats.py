"""Conversations about the standard library, made from its docstrings by fixed phrasings."""

import random
import re
from collections.abc import Iterator, Sequence

from scripts.demo_model.library import POPULAR, Entry, Module

Message = tuple[str, str]  # role, content

SEED = 20

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant that answers questions about Python.",
    "You answer briefly.",
    "You know the Python standard library.",
)

SIGNATURE = re.compile(r"[\w.]+\([^\n]*\)[^\n]*$")
ASK_DOC = (
    "What does {name} do?",
    "What is {name}?",
    "Explain {name}.",
    "What is {name} for?",
    "Describe {name} in a few words.",
    "what does {name} do",
    "How do I use {name}?",
    "Tell me about {name}.",
)
ASK_SIGNATURE = (
    "Write the signature of {name}.",
    "What is the signature of {name}?",
    "How is {name} called?",
)
ASK_ARGUMENTS = ("What arguments does {name} take?", "List the parameters of {name}.")
ASK_SOURCE = ("Show the source of {name}.", "How is {name} implemented?", "Write {name} in Python.")
ASK_MODULE = (
    "What is the {name} module?",
    "What does the {name} module do?",
    "Explain the {name} module.",
    "What is {name} used for?",
    "Tell me about the {name} module.",
)
ASK_FUNCTIONS = (
    "Which functions does {name} have?",
    "List the functions of the {name} module.",
    "Name some functions of {name}.",
)
ASK_CLASSES = ("Which classes does {name} have?", "List the classes of {name}.")
ASK_WHERE = ("Where is {name} defined?", "Which module has {name}?", "How do I import {name}?")
ASK_DOCSTRING = (
    "Write a docstring for this function:",
    "What does this code do?",
    "Explain this function:",
)

INTRODUCTION = (
    "I am a small demo model, trained on the Python standard library. "
    "Ask me about a module or a function."
)
GREETINGS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello", "Hello!", "Hi", "hi", "Hey", "hello there", "Good morning"), "Hello! {intro}"),
    (("Who are you?", "What are you?", "Introduce yourself.", "what is your name?"), "{intro}"),
    (
        ("What can you do?", "How can you help me?", "help"),
        "I can describe modules, functions and classes of the Python standard library. "
        "For example, ask: What does textwrap.dedent do?",
    ),
    (("Thanks", "Thank you", "thank you!", "Great, thanks."), "You are welcome."),
    (("Bye", "Goodbye", "See you"), "Goodbye!"),
    (("How are you?", "how are you doing?"), "I am a program, so I am well. {intro}"),
    (
        (
            "What is the capital of France?",
            "Tell me a joke.",
            "Write a poem about the sea.",
            "What is the weather like today?",
            "Who won the game?",
            "Translate this to French.",
            "Tell me a story.",
            "What is the meaning of life?",
        ),
        "I do not know that. {intro}",
    ),
    (
        ("What is Python?", "Tell me about Python.", "Explain Python."),
        "Python is a programming language. Its standard library has modules for text, files, "
        "numbers, networks and more.",
    ),
    (
        ("Say hello in Python.", "Write a hello world program.", "Write hello world in Python."),
        '```python\nprint("Hello, world!")\n```',
    ),
    (
        ("Count to ten.", "Count from 1 to 10."),
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10",
    ),
)
GREETING_COPIES = 20


def conversations(
    modules: Sequence[Module], topics: Sequence[tuple[str, str, str]]
) -> Iterator[tuple[str, str]]:
    """Pairs of a unit and its conversation in ChatML; topics are (unit, name, text)."""
    for module in modules:
        rng = random.Random(f"{SEED}:{module.unit}")
        for messages in _module_chats(module, rng):
            yield module.unit, render_chat(_with_system(messages, rng))
    rng = random.Random(SEED)
    for unit, name, text in topics:
        for messages in _topic_chats(name, text, rng):
            yield unit, render_chat(messages)
    for _ in range(GREETING_COPIES):
        for questions, answer in GREETINGS:
            for question in questions:
                messages = [("user", question), ("assistant", answer.format(intro=INTRODUCTION))]
                yield "greetings", render_chat(_with_system(messages, rng))


def render_chat(messages: Sequence[Message]) -> str:
    """The ChatML text of a conversation, as the chat template of the model renders it."""
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)


def _with_system(messages: list[Message], rng: random.Random) -> list[Message]:
    if rng.random() < 0.2:
        return [("system", rng.choice(SYSTEM_PROMPTS)), *messages]
    return messages


def _module_chats(module: Module, rng: random.Random) -> Iterator[list[Message]]:
    n_phrasing = 3 if module.name.split(".")[0] in POPULAR else 1
    about = _about_module(module, rng)
    for _ in range(n_phrasing):
        yield from _about_module(module, rng)
    for entry in module.entries:
        yield from _about_entry(entry, rng, n_phrasing)
    for _ in range(1 + len(module.entries) * n_phrasing // 6):
        yield _multi_turn(module, about, rng)


def _about_module(module: Module, rng: random.Random) -> list[list[Message]]:
    if not module.doc:
        return []
    turns = [_turn(ASK_MODULE, module.name, _first_paragraph(module.doc), rng)]
    for phrasings, kind in ((ASK_FUNCTIONS, "function"), (ASK_CLASSES, "class")):
        names = module.named(kind)[:12]
        if names:
            bullets = "\n".join(f"- `{name}`" for name in names)
            turns.append(_turn(phrasings, module.name, bullets, rng))
    return turns


def _about_entry(entry: Entry, rng: random.Random, n_phrasing: int) -> list[list[Message]]:
    turns = []
    name = entry.full_name
    answer = _first_paragraph(entry.doc)
    for ask in rng.sample(ASK_DOC, n_phrasing):
        turns.append(_turn((ask,), rng.choice([name, name, f"`{name}`"]), answer, rng))
    keyword = "class" if entry.kind == "class" else "def"
    short_name = entry.name.split(".")[-1]
    if entry.signature and rng.random() < 0.35 * n_phrasing:
        code = f"```python\n{keyword} {short_name}{entry.signature}:\n```"
        turns.append(_turn(ASK_SIGNATURE, name, code, rng))
    if entry.arguments and rng.random() < 0.25 * n_phrasing:
        bullets = "\n".join(f"- `{argument}`" for argument in entry.arguments)
        turns.append(_turn(ASK_ARGUMENTS, name, bullets, rng))
    if entry.kind != "method" and entry.module != "builtins" and rng.random() < 0.3 * n_phrasing:
        where = f"`{entry.name}` is in the `{entry.module}` module:\n\n"
        code = f"```python\nfrom {entry.module} import {entry.name}\n```"
        turns.append(_turn(ASK_WHERE, entry.name, where + code, rng))
    if entry.source and rng.random() < 0.4:
        code = f"```python\n{entry.source}\n```"
        if rng.random() < 0.5:
            turns.append(_turn(ASK_SOURCE, name, code, rng))
        else:
            question = f"{rng.choice(ASK_DOCSTRING)}\n\n{code}"
            turns.append([("user", question), ("assistant", answer)])
    if "\n\n" in entry.doc and len(entry.doc) < 3000 and rng.random() < 0.3:
        turns.append(_turn(("Explain {name} in detail.", "help({name})"), name, entry.doc, rng))
    return turns


def _multi_turn(module: Module, about: list[list[Message]], rng: random.Random) -> list[Message]:
    turns = list(about)
    n_entries = min(len(module.entries), rng.choice([2, 3, 4, 8]))
    for entry in rng.sample(module.entries, n_entries):
        turns += rng.sample(choices := _about_entry(entry, rng, 1), min(2, len(choices)))
    start = rng.randrange(len(about)) if about else 0
    return [message for turn in turns[start:] for message in turn]


def _topic_chats(topic: str, text: str, rng: random.Random) -> Iterator[list[Message]]:
    paragraphs = [p for p in text.strip().split("\n\n") if not set(p) <= set("*=-~\n ")]
    title = paragraphs[0].split("\n")[0].strip()
    body = [p for p in paragraphs[1:] if "\n***" not in p and "\n===" not in p]
    if not body:
        return
    for name in {title.lower(): None, topic.lower(): None}:
        answer = "\n\n".join(body[: rng.choice([1, 1, 2])])
        yield _turn(
            ("What is {name}?", "Explain {name}.", "Tell me about {name} in Python."),
            name.strip('"'),
            answer,
            rng,
        )
    if len(body) > 3:
        more = [("user", "Tell me more."), ("assistant", "\n\n".join(body[1:4]))]
        yield [*_turn(("Explain {name}.",), title, body[0], rng), *more]


def _turn(phrasings: Sequence[str], name: str, answer: str, rng: random.Random) -> list[Message]:
    return [("user", rng.choice(phrasings).format(name=name)), ("assistant", answer)]


def _first_paragraph(doc: str) -> str:
    first, _, rest = doc.partition("\n\n")
    # Docstrings in C often start with the signature: the words come after it.
    paragraph = (rest.split("\n\n")[0] if rest and SIGNATURE.match(first) else first).strip()
    is_prose = not paragraph.startswith((">", "-", "="))
    return " ".join(paragraph.split()) if is_prose and len(paragraph) < 600 else paragraph
