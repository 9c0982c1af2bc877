"""What happens to words between the model and the reader; no model here."""

from __future__ import annotations

import threading

import pytest
import tiny_llava

from mmpipe.chat.escape import visible
from mmpipe.chat.messages import ChatError, Reply, Sampling
from mmpipe.chat.queue import Answer, Busy, Desk
from mmpipe.chat.stream import Detokenizer, TextStream


def test_control_characters_are_shown_not_obeyed():
    assert visible("\x1b]0;title\x07 a\tb\n\x9b2J\r\u202e") == "␛]0;title␇ a\tb\n<9B>2J␍<202E>"
    assert visible("Ähnlich 红色 🙂") == "Ähnlich 红色 🙂"


@pytest.mark.parametrize("text", ["red circle", "Größe 红色 🙂👍🏽 ok", "", " ", "a\n\n b"])
def test_pieces_join_to_the_decoded_whole(text):
    tokenizer = tiny_llava.tokenizer()  # a token a byte: characters take up to four
    words = Detokenizer(tokenizer)
    pieces = [words.feed(token) for token in tokenizer.encode(text)]
    assert "".join([*pieces, words.rest()]) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_cut_in_the_middle_is_shown_at_the_end():
    tokenizer = tiny_llava.tokenizer()
    words = Detokenizer(tokenizer)
    assert [words.feed(token) for token in tokenizer.encode("a🙂")[:-1]] == ["a", "", "", ""]
    assert words.rest() == "\ufffd"


@pytest.mark.parametrize("cut", [1, 2, 3, 50])
def test_a_text_ends_before_a_stop_text_however_it_is_cut(cut):
    stream = TextStream(("###", "END"))
    text = "  one # two ## E EN three ### four"
    shown = "".join(stream.feed(text[i : i + cut]) for i in range(0, len(text), cut)) + stream.rest()
    assert shown == "one # two ## E EN three " == stream.text
    assert stream.ended


def test_what_could_have_been_a_stop_text_comes_at_the_end():
    stream = TextStream(("###",))
    assert stream.feed("a##") == "a"
    assert stream.rest() == "##"
    assert not stream.ended


def reply(text: str) -> Reply:
    return Reply(text, 1, 1, "stop")


def test_one_answer_at_a_time_in_the_order_of_asking():
    desk, running, order = Desk(), threading.Semaphore(1), []

    def make(number: int, answer: Answer) -> Reply:
        assert running.acquire(blocking=False)
        order.append(number)
        answer.say(str(number))
        running.release()
        return reply(str(number))

    answers = [desk.ask(lambda a, n=number: make(n, a)) for number in range(8)]
    assert [list(answer) for answer in answers] == [[str(n)] for n in range(8)]
    assert order == list(range(8))
    desk.close()


def test_a_full_desk_refuses_and_goes_on():
    desk, gate = Desk(places=2), threading.Event()

    def wait(answer: Answer) -> Reply:
        gate.wait()
        return reply("")

    waiting = [desk.ask(wait), desk.ask(wait)]
    with pytest.raises(Busy, match="2 answers"):
        desk.ask(wait)
    gate.set()
    assert [answer.reply.finish for answer in waiting] == ["stop", "stop"]
    desk.close()


def test_what_goes_wrong_reaches_the_reader():
    desk = Desk()

    def fail(answer: Answer) -> Reply:
        answer.say("half")
        raise ChatError("no more")

    answer = desk.ask(fail)
    with pytest.raises(ChatError, match="no more"):
        list(answer)
    assert list(desk.ask(lambda a: reply("next"))) == []
    desk.close()


def test_closing_stops_what_is_being_said():
    desk = Desk()

    def endless(answer: Answer) -> Reply:
        while not answer.is_stopped:
            pass
        return reply("stopped")

    answer = desk.ask(endless)
    desk.close()
    assert answer.reply.text == "stopped"


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"max_tokens": 0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ChatError, match=next(iter(wrong))):
        Sampling(**wrong)
