"""The server: OpenAI's protocol through OpenAI's own client, and the page in a real browser."""

from __future__ import annotations

import base64
import io
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chat_models
import pytest
import requests
from chat_models import BLUE, RED, talk
from PIL import Image

from mmpipe.chat.messages import Completion
from mmpipe.chat.model import ChatModel
from mmpipe.chat.options import SamplingOptions
from mmpipe.chat.queue import AnswerStream, RequestQueue
from mmpipe.checkpoints.save import save_checkpoint
from mmpipe.models.moe.spec import MoESettings
from mmpipe.models.moe.upcycle import upcycle
from mmpipe.models.sparsity import io as sparsity_io
from mmpipe.models.sparsity.hooks import sparsify
from mmpipe.models.sparsity.spec import SparsitySettings

pytest.importorskip("gradio", reason="the extra 'chat' is not installed")
openai = pytest.importorskip("openai", reason="the extra 'judge' is not installed")

ATTACK = "<img src=x onerror=\"document.title='owned'\"><b>bold</b> **stars**"


class Scripted(ChatModel):
    """A checkpoint that says what it is told to, as slowly."""

    def __init__(self, like: ChatModel, name: str, words: list[str], pause: float = 0) -> None:
        self.__dict__.update(like.__dict__)
        self.name, self.words, self.pause = name, words, pause

    def _generate(self, messages: Any, sampling: SamplingOptions, answer: AnswerStream) -> Completion:
        spoken = []
        for word in self.words:
            if answer.is_cancelled:
                break
            answer.put(word)
            spoken.append(word)
            time.sleep(self.pause)
        return Completion("".join(spoken), 1, len(spoken), "stopped" if answer.is_cancelled else "stop")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ChatModel]]:
    folder, queue = tmp_path_factory.mktemp("served"), RequestQueue(size=6)
    made = talk(chat_models.publish(folder / "model"), queue)
    yield {
        "tiny": made,
        "attack": Scripted(made, "attack", [ATTACK]),
        "slow": Scripted(made, "slow", ["word "] * 600, 0.05),
    }
    queue.close()


class Running:
    """A server of ours in a thread."""

    def __init__(self, models: dict[str, ChatModel], **bounds: Any) -> None:
        import uvicorn

        from mmpipe.chat.server import HOST, build, configure

        app = build(models, SamplingOptions(temperature=0, max_tokens=12), **bounds)
        self._server = uvicorn.Server(configure(app, host=HOST, port=0))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.02)
        self.url = f"http://{HOST}:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture(scope="module")
def url(models: dict[str, ChatModel]) -> Iterator[str]:
    served = Running(models)
    yield served.url
    served.close()


@pytest.fixture
def client(url: str) -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def data_url(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def question(text: str, *urls: str) -> list[dict[str, Any]]:
    images = [{"type": "image_url", "image_url": {"url": url, "detail": "low"}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny", "attack", "slow"]
    assert client.models.retrieve("tiny").owned_by == "mmpipe"


def test_an_answer_whole_and_streamed_is_the_models_own(client, models):
    from mmpipe.chat.messages import user_message

    asked: dict[str, Any] = {"model": "tiny", "messages": question("What?", data_url(RED), data_url(BLUE))}
    whole = client.chat.completions.create(**asked)
    done = (
        models["tiny"]
        .answer([user_message("What?", [RED, BLUE])], SamplingOptions(temperature=0, max_tokens=12))
        .completion
    )
    assert whole.choices[0].message.content == done.text
    assert whole.choices[0].finish_reason == done.finish == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (done.prompt_tokens, done.tokens)

    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.rstrip() == done.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].usage == whole.usage


def test_settings_of_a_request(client):
    def said(**settings: Any) -> Any:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say."}]
        return client.chat.completions.create(model="tiny", messages=messages, **settings).choices[0]

    assert said(temperature=2, seed=1).message.content == said(temperature=2, seed=1).message.content
    whole = said(frequency_penalty=0, n=1, user="me", response_format={"type": "text"}).message.content
    cut = said(stop=whole[3:5])
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(whole[3:5])].rstrip(), "stop")
    assert len(said(max_completion_tokens=2).message.content) < len(whole)


@pytest.mark.parametrize(
    ("change", "status", "why"),
    [
        ({"model": "tinny"}, 404, "did you mean 'tiny'"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "last message must be the user's"),
        ({"messages": question("?", "http://127.0.0.1:9/x.png")}, 400, "private network"),
        ({"messages": question("?", "file:///etc/passwd")}, 400, "not an http"),
        ({"messages": question("?", "data:image/png;base64,AAAA")}, 400, "none of the formats"),
        ({"messages": question("?", *["data:,"] * 17)}, 400, "at most 16"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, 400, "takes 1024; clear it"),
        ({"temperature": 3}, 400, "temperature"),
        ({"n": 2}, 400, "'n' is not supported"),
        ({"logprobs": True}, 400, "'logprobs' is not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "'tools' is not supported"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_said_in_openais_way(client, change, status, why, stream):
    asked = {"model": "tiny", "messages": question("What?"), "stream": stream}
    with pytest.raises(openai.APIStatusError, match=why) as raised:
        client.chat.completions.create(**asked | change)
    assert raised.value.status_code == status
    assert raised.value.body["type"] == "invalid_request_error"


def test_requests_in_parallel_get_their_own_answers(client):
    texts = ["One", "Twenty", "Three hundred", "4", "5!"]

    def said(text: str) -> str:
        asked = {"model": "tiny", "messages": question(text, data_url(RED))}
        return str(client.chat.completions.create(**asked).choices[0].message.content)

    alone, together = [said(text) for text in texts], [""] * len(texts)

    def fill(place: int) -> None:
        together[place] = said(texts[place])

    threads = [threading.Thread(target=fill, args=[place]) for place in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_readers_who_leave_free_the_model(client):
    slow: dict[str, Any] = {"model": "slow", "messages": question("Go on.")}
    stream = client.chat.completions.create(**slow, stream=True)
    next(iter(stream))
    with pytest.raises(openai.APITimeoutError):  # leaves before its turn comes
        client.chat.completions.create(**slow, timeout=0.5)
    start = time.monotonic()
    stream.close()
    assert client.chat.completions.create(model="tiny", messages=question("Say.")).choices
    assert time.monotonic() - start < 10  # the two others would have taken a minute


def test_when_too_many_wait_it_says_so(client, models):
    gate = threading.Event()

    def wait(answer: AnswerStream) -> Completion:
        gate.wait()
        return Completion("", 1, 1, "stop")

    waiting = [models["tiny"].queue.submit(wait) for _ in range(6)]
    with pytest.raises(openai.RateLimitError, match="try again later"):
        client.chat.completions.create(model="tiny", messages=question("Say."))
    gate.set()
    assert [answer.completion.text for answer in waiting] == [""] * 6


def test_other_sites_get_nothing(url):
    assert requests.get(f"{url}/v1/models", headers={"Host": "evil.example"}).status_code == 400
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}]}'
    plain = requests.post(f"{url}/v1/chat/completions", data=body, headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415
    assert requests.get(f"{url}/gradio_api/file=/etc/passwd").status_code in (403, 404)
    json = {"Content-Type": "application/json"}
    assert requests.post(f"{url}/v1/chat/completions", data=b"{", headers=json).status_code == 400
    large = requests.post(f"{url}/v1/chat/completions", data=(b" " * (1 << 20) for _ in range(66)), headers=json)
    assert large.status_code == 413


# ---- the page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright drives the browser")
    with api.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def beside(models: dict[str, ChatModel], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two checkpoints side by side: one with experts, one sparsified."""
    folder, queue = tmp_path_factory.mktemp("beside"), models["tiny"].queue
    settings = MoESettings(experts=4, top_k=2, placement=(1, 3))
    experts = upcycle(chat_models.model(), settings)
    save_checkpoint(experts, chat_models.processor(), folder / "experts")
    sparse = chat_models.model()
    sparsify(sparse, SparsitySettings(vision_keep_rate=0.5))
    save_checkpoint(sparse, chat_models.processor(), folder / "sparse")
    sparsity_io.save(sparse, folder / "sparse")
    for name in ("experts", "sparse"):
        chat_models.card(folder / name)
    served = Running({name: talk(folder / name, queue) for name in ("experts", "sparse")})
    yield served.url
    served.close()


@pytest.mark.browser
def test_two_checkpoints_answer_about_a_dropped_image(browser, beside, tmp_path):
    image = tmp_path / "image.png"
    Image.effect_mandelbrot((200, 150), (-2, -1, 1, 1), 60).convert("RGB").save(image)
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    away: list[str] = []
    page.on("request", lambda request: away.append(request.url) if not request.url.startswith(beside) else None)
    page.goto(beside)
    page.locator("#question input[type=file]").set_input_files(image)
    page.locator("#question .thumbnail-item, #question img").first.wait_for()
    page.locator("#question textarea").fill("What do you see?")
    page.keyboard.press("Enter")
    page.locator(".experts").wait_for()
    page.locator(".kept img").wait_for()
    page.wait_for_function("document.querySelectorAll('.bot').length >= 2")
    assert page.locator(".experts tr").count() == 2
    page.screenshot(path=Path(tmp_path / "page.png"), full_page=True)
    page.locator("#clear").click()
    page.locator(".bot").first.wait_for(state="detached")
    assert [place for place in away if not place.startswith(("data:", "blob:"))] == []
    page.close()


@pytest.mark.browser
def test_markup_of_a_model_is_text_and_an_answer_can_be_stopped(browser, url):
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.goto(url)
    page.locator("#question textarea").fill("Go on.")
    page.keyboard.press("Enter")
    time.sleep(4)
    print(page.locator(".bot").all_inner_texts(), page.content()[:0])
    page.get_by_text("<b>bold</b> **stars**").wait_for()
    assert page.locator(".bot b").count() == 0
    assert page.title() == "mmpipe"
    page.get_by_text("word word word").wait_for()  # tokens arrive while it speaks
    page.locator("#stop").click()
    time.sleep(0.5)
    said = page.locator(".bot").last.inner_text()
    time.sleep(0.5)
    assert page.locator(".bot").last.inner_text() == said
    assert 3 <= said.count("word") < 600
    page.locator("#question textarea").fill("")
    page.keyboard.press("Enter")
    page.get_by_text("Write a question or drop an image.").wait_for()
    page.close()
