"""Chat templates render as Hugging Face renders them, and hostile ones stop at their limits."""

import contextlib
import json
import time

import pytest

from loadmaster.errors import DamagedFileError, UsageError
from loadmaster.tasks.template import TEMPLATE_LIMIT_BYTES, ChatTemplate, chatml

HELLO = [{"role": "user", "content": "Hello"}]


def render(source: str, messages: list[dict[str, str]] = HELLO, cpu_limit_s: float = 2.0) -> str:
    with ChatTemplate(source, cpu_limit_s=cpu_limit_s) as template:
        return template.render(messages, bos_text="<s>", eos_text="</s>")


def test_renders_messages_and_special_tokens() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}\n"
        "    {% if m.role == 'user' %}\n"
        "[{{ m['content'] | trim }}]\n"
        "    {% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    assert render(source, [{"role": "user", "content": " hi "}]) == "<s>[hi]\nA:"


def test_follows_hugging_face_in_json_loops_and_generation() -> None:
    source = (
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "{{ {'a': '<é>'} | tojson }}{% generation %}x{% endgeneration %}"
        "{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}{{ strftime_now('%%') }}"
    )
    assert render(source) == '01{"a": "<é>"}x2%'


def test_a_large_conversation_passes_through_the_pipe() -> None:
    text = "é" * 1_000_000
    assert render("{{ messages[0].content }}", [{"role": "user", "content": text}]) == text


def test_one_child_serves_many_renders() -> None:
    with ChatTemplate("{{ messages | length }}") as template:
        pid = template.pid
        assert [template.render(HELLO * n) for n in range(3)] == ["0", "1", "2"]
        assert template.pid == pid


def test_without_a_template_chatml_is_used() -> None:
    with ChatTemplate(None) as template:
        assert template.is_fallback
        assert template.pid is None
        assert template.render(HELLO) == chatml(HELLO)
    assert chatml(HELLO) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_a_refusal_of_the_template_is_the_users_to_mend() -> None:
    with pytest.raises(UsageError, match="System role not supported") as caught:
        render("{{ raise_exception('System role not supported') }}")
    assert caught.value.hint is not None
    assert "--system" in caught.value.hint


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}{{ ''.__class__.__mro__ }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ '{0.__class__.__base__}'.format(messages) }}",
        "{{ ('%s' | format)('{0.__class__}').format('') }}",
        "{% set _ = messages.append(1) %}",
        "{% set _ = messages[0].clear() %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.name }}",
        "{{ messages[0]",
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ range(10**6) | list }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ self._TemplateReference__context.environment }}",
    ],
)
def test_escapes_are_refused_or_render_nothing_of_python(source: str) -> None:
    text = ""
    with contextlib.suppress(DamagedFileError):
        text = render(source)
    assert "class" not in text
    assert "<" not in text
    assert "uid=" not in text


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**9 }}",
        "{% set x = 'a' * 10**7 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
        "{{ ('%' ~ '999999999' ~ 'd') | format(1) }}",
        "{{ [0] * 10**9 }}",
        "{{ 'a'.center(10**9) }}",
        "{{ 'ab' | replace('a', 'b' * 10**5) | replace('b', 'c' * 10**5) }}",
    ],
)
def test_bombs_of_bytes_stop_at_the_limit(source: str) -> None:
    with pytest.raises(DamagedFileError, match=r"memory|longer than|more than") as caught:
        render(source)
    assert caught.value.code == "bad_template"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10**(10**8) }}",
        "{% macro f() %}{% for i in range(99999) %}{{ f() }}{% endfor %}{% endmacro %}{{ f() }}",
    ],
)
def test_bombs_of_time_stop_at_the_limit(source: str) -> None:
    started = time.monotonic()
    with pytest.raises(DamagedFileError, match=r"more than|Recursion"):
        render(source, cpu_limit_s=0.2)
    assert time.monotonic() - started < 60


def test_a_template_works_again_after_its_child_was_killed() -> None:
    source = (
        "{% if messages[0].content == 'loop' %}"
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        "{% endif %}ok"
    )
    with ChatTemplate(source, cpu_limit_s=0.2) as template:
        with pytest.raises(DamagedFileError):
            template.render([{"role": "user", "content": "loop"}])
        assert template.render(HELLO) == "ok"


def test_an_oversized_template_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(DamagedFileError, match=str(TEMPLATE_LIMIT_BYTES)):
        ChatTemplate("x" * (TEMPLATE_LIMIT_BYTES + 1))


def test_the_child_sees_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with ChatTemplate("{{ messages | tojson }}") as template:
        assert json.loads(template.render(HELLO)) == HELLO
        with open(f"/proc/{template.pid}/environ", encoding="utf-8") as environ:
            assert "secret" not in environ.read()
