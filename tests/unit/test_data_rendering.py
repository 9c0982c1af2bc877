"""A chat template that comes with a checkpoint cannot hold up, fill or end the process that uses it."""

from __future__ import annotations

import os
import signal
import time

import pytest

from mmpipe.data import rendering
from mmpipe.data.records import Turn
from mmpipe.data.rendering import render_chat
from mmpipe.data.templates import TokenizerTemplate, get_template, own_jinja, render_jinja, template_names, to_messages
from mmpipe.errors import DataError

TURNS = (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat \ud800."))
LOOP = "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ messages[0].nothing.at_all }}", "UndefinedError"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ raise_exception('only in French') }}", "TemplateError: only in French"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('touch ran') }}", "SecurityError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ '(' * 200 }}{% set x = " + "(" * 5000 + "1" + ")" * 5000 + " %}", "cannot be used"),
        ("{{ 'x' * 2000000000 }}", "memory"),
        ("{{ 'x' * 20000000 }}", "a text of more than"),
        ("{{ '%2000000000d' % 1 }}", "memory"),
        ("{{ ('a' * 100000) | replace('a', 'b' * 100000) }}", "memory"),
    ],
)
def test_a_template_that_fails_is_an_error_in_a_sentence(template, problem):
    with pytest.raises(DataError, match=r"the chat template of evil cannot be used: .+") as caught:
        render_chat(template, to_messages(TURNS), "evil")
    assert problem in str(caught.value)
    assert render_chat("{{ messages | length }}", to_messages(TURNS), "good") == ("2", [])


@pytest.mark.parametrize("template", [LOOP, "{% set x = 9 ** (9 ** 9) %}"])
def test_a_template_that_does_not_end_is_ended(template, monkeypatch):
    monkeypatch.setattr(rendering, "_workers", {})
    monkeypatch.setattr(rendering, "_SECONDS", 1)
    began = time.monotonic()
    with pytest.raises(DataError, match="it does not end, or takes too much memory"):
        render_chat(template, to_messages(TURNS), "evil")
    assert time.monotonic() - began < 30
    assert render_chat("{{ messages | length }}", to_messages(TURNS), "good") == ("2", [])


@pytest.mark.parametrize("name", [name for name in template_names() if name != TokenizerTemplate.name])
def test_a_worker_renders_as_this_process_does(name):
    jinja, messages = get_template(name).jinja(), to_messages(TURNS)
    assert jinja in own_jinja()
    assert render_chat(jinja, messages, name)[0] == render_jinja(jinja, messages, name)[0]


def test_spans_and_marks_of_images_pass_through_the_worker():
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}{{ eos_token }}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
    text, spans = render_chat(template, messages, "good", return_assistant_tokens_mask=True, eos_token="</s>")
    assert (text, spans) == ("a|bc|</s>", [(0, 1), (2, 4)])
    seen = [{"role": "user", "content": [{"type": "image", "image": object()}]}]
    assert render_chat("{{ messages[0].content[0].image }}", seen, "good")[0] == "<object>"


def test_a_worker_that_was_killed_is_replaced_and_a_fork_starts_its_own():
    assert render_chat("{{ 1 }}", [], "good")[0] == "1"
    first = rendering._workers[os.getpid()][0]
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert render_chat("{{ 2 }}", [], "good")[0] == "2"
    assert rendering._workers[os.getpid()][0].pid != first.pid
