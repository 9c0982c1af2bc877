"""What happens to words between the model and the reader; no model here."""

from __future__ import annotations

import threading

import pytest
import tiny_llava
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from mmpipe.chat.messages import ChatError, Completion
from mmpipe.chat.model import TokenStreamer
from mmpipe.chat.options import SamplingOptions
from mmpipe.chat.queue import AnswerStream, QueueFull, RequestQueue
from mmpipe.escapes import printable


def test_control_characters_are_shown_not_obeyed():
    assert printable("\x1b]0;title\x07 a\tb\n\x9b2J\r\u202e") == "␛]0;title␇ a\tb\n<9B>2J␍<202E>"
    assert printable("Ähnlich 红色 🙂") == "Ähnlich 红色 🙂"


def stream(tokenizer: object, ids: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], TokenStreamer]:
    """What each token sends, the end last, and the streamer."""
    sent: list[str] = []
    streamer = TokenStreamer(tokenizer, stops, sent.append)  # type: ignore[arg-type]
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    pieces = []
    for token in ids:
        streamer.put(torch.tensor([token]))
        pieces.append("".join(sent))
        sent.clear()
    streamer.end()
    return [*pieces, "".join(sent)], streamer


class Chunks:
    """A tokenizer whose tokens are the parts of a text."""

    def __init__(self, text: str, size: int = 1) -> None:
        self.parts = [text[i : i + size] for i in range(0, len(text), size)]

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(self.parts[i] for i in ids)


def llama_like() -> PreTrainedTokenizerFast:
    """Blanks belong to the token after them, and the first one is dropped in decoding; a token may be a byte."""
    tokens = ["<unk>", "\u2581\u2581-", "\u2581one", "two", "<0x0A>", "<0xE7>", "<0xBA>", "<0xA2>"]
    backend = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, [], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("text", ["red circle", "Größe 红色 🙂👍🏽 ok", "", " ", "a\n\n b"])
def test_pieces_join_to_the_decoded_whole(text):
    tokenizer = tiny_llava.tokenizer()  # a token a byte: characters take up to four
    pieces, streamer = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == streamer.text == text.lstrip()  # an answer has no blanks before it
    assert not any("\ufffd" in piece for piece in pieces)


def test_blanks_after_a_line_break_and_damaged_bytes_of_llama_like_tokenizers():
    tokenizer = llama_like()
    indented, _ = stream(tokenizer, [2, 4, 1, 2, 3])
    assert indented == ["one", "\n", "  -", " one", "two", ""]
    damaged, _ = stream(tokenizer, [3, 5, 3, 5, 6, 7, 5])
    assert damaged[:-1] == ["two", "", "\ufffdtwo", "", "", "红", ""]


def test_a_character_cut_in_the_middle_is_shown_at_the_end():
    tokenizer = tiny_llava.tokenizer()
    assert stream(tokenizer, tokenizer.encode("a🙂")[:-1])[0] == ["a", "", "", "", "\ufffd"]


@pytest.mark.parametrize("cut", [1, 2, 3, 50])
def test_a_text_ends_before_a_stop_text_however_it_is_cut(cut):
    chunks = Chunks("  one # two ## E EN three ### four", cut)
    pieces, streamer = stream(chunks, list(range(len(chunks.parts))), ("###", "END"))
    assert "".join(pieces) == "one # two ## E EN three " == streamer.text
    assert streamer.ended


def test_what_could_have_been_a_stop_text_comes_at_the_end():
    pieces, streamer = stream(Chunks("a##"), [0, 1, 2], ("###",))
    assert pieces == ["a", "", "", "##"]
    assert not streamer.ended


def completion(text: str) -> Completion:
    return Completion(text, 1, 1, "stop")


def test_one_answer_at_a_time_in_the_order_of_asking():
    queue, running, order = RequestQueue(), threading.Semaphore(1), []

    def make(number: int, answer: AnswerStream) -> Completion:
        assert running.acquire(blocking=False)
        order.append(number)
        answer.put(str(number))
        running.release()
        return completion(str(number))

    answers = [queue.submit(lambda a, n=number: make(n, a)) for number in range(8)]
    assert [list(answer) for answer in answers] == [[str(n)] for n in range(8)]
    assert order == list(range(8))
    queue.close()


def test_a_full_queue_refuses_and_goes_on():
    queue, gate = RequestQueue(size=2), threading.Event()

    def wait(answer: AnswerStream) -> Completion:
        gate.wait()
        return completion("")

    waiting = [queue.submit(wait), queue.submit(wait)]
    with pytest.raises(QueueFull, match="2 answers"):
        queue.submit(wait)
    gate.set()
    assert [answer.completion.finish for answer in waiting] == ["stop", "stop"]
    queue.close()


def test_what_goes_wrong_reaches_the_reader():
    queue = RequestQueue()

    def fail(answer: AnswerStream) -> Completion:
        answer.put("half")
        raise ChatError("no more")

    answer = queue.submit(fail)
    with pytest.raises(ChatError, match="no more"):
        list(answer)
    assert list(queue.submit(lambda a: completion("next"))) == []
    queue.close()


def test_closing_stops_what_is_being_said():
    queue = RequestQueue()

    def endless(answer: AnswerStream) -> Completion:
        while not answer.is_cancelled:
            pass
        return completion("stopped")

    answer = queue.submit(endless)
    queue.close()
    assert answer.completion.text == "stopped"


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"max_tokens": 0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ChatError, match=next(iter(wrong))):
        SamplingOptions(**wrong)
