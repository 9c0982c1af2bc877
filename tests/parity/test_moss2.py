"""MOSS2's packed weights as a stock Llama: the published model's numbers, before and beyond its longest length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mmpipe.checkpoints.layouts import get

VECTOR = json.loads((Path(__file__).parents[1] / "fixtures/vectors/llava/moss2_tiny.json").read_text())


def filled() -> dict[str, torch.Tensor]:
    """The weights of the fill rule: parameters by name, k the rank, j the element."""
    tensors = {}
    for k, name in enumerate(VECTOR["sorted_param_names"]):
        shape = VECTOR["shapes"][name]
        j = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        wave = torch.sin(0.7 * j + k)
        values = 1 + 0.1 * wave if len(shape) == 1 else 0.2 * wave
        tensors[name] = values.float().view(shape)
    return tensors


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_file(filled(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(VECTOR["config"] | {"model_type": "Moss2"}))
    return tmp_path


@pytest.fixture
def model(directory: Path) -> Any:
    return get("moss2").language(directory, torch.float32)


@pytest.mark.parametrize("run", VECTOR["runs"], ids=lambda run: f"{run['seq']} tokens")
def test_logits_equal_the_published_model_up_to_and_beyond_its_length(model, run):
    ids = torch.tensor([run["input_ids"]])
    with torch.no_grad():
        out = model(ids, labels=ids)
    torch.testing.assert_close(out.logits[0, 0], torch.tensor(run["logits_first"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.logits[0, -1], torch.tensor(run["logits_last"]), rtol=0, atol=1e-5)
    assert out.loss.item() == pytest.approx(run["loss"], abs=1e-5)


def test_the_rotary_table_grows_as_published_and_shrinks_again(model):
    """Of other lengths than the published one its table stays grown, which changes the next short text."""
    rotary, hidden = model.model.rotary_emb, torch.zeros(1)

    def cosines(length: int) -> list[float]:
        return rotary(hidden, torch.arange(length)[None])[0][0, 5].tolist()

    first, *grown = VECTOR["rotary"]
    assert cosines(10) == pytest.approx(first["cos_row5"], abs=1e-6)
    for row in sorted(grown, key=lambda row: row["seq"]):
        assert cosines(row["seq"]) == pytest.approx(row["cos_row5"], abs=1e-6)
        assert rotary.inv_freq.tolist() == pytest.approx(row["inv_freq"], rel=1e-5)
    published = VECTOR["rotary_after_48_then_10_cos_row5"]
    assert cosines(10) == pytest.approx(first["cos_row5"], abs=1e-6) != pytest.approx(published, abs=1e-3)


def test_cached_decoding_equals_the_published_model(model):
    decode = VECTOR["decode"]
    with torch.no_grad():
        cache = model(torch.tensor([decode["prompt"]]), use_cache=True).past_key_values
        for step in decode["steps"]:
            out = model(torch.tensor([[step["token"]]]), past_key_values=cache, use_cache=True)
            torch.testing.assert_close(out.logits[0, -1], torch.tensor(step["logits"]), rtol=0, atol=1e-5)
            cache = out.past_key_values


def test_the_way_back_is_exact(model):
    layout, before = get("moss2"), filled()
    after = layout.from_stock(model.state_dict(), model.config)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    written = layout.written(model.config)
    expected = VECTOR["config"]
    assert {key: written[key] for key in expected} == expected


def test_new_names_of_the_rotary_settings_are_read_too(model):
    config = {key: value for key, value in VECTOR["config"].items() if not key.startswith("rope")}
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000000}
    assert get("moss2").config(config).rope_parameters == model.config.rope_parameters


def test_the_real_model_has_the_published_number_of_parameters():
    config = get("moss2").config(
        {
            "vocab_size": 137728,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "tie_word_embeddings": False,
        }
    )
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        shell = LlamaForCausalLM(config)
    assert sum(parameter.numel() for parameter in shell.parameters()) == VECTOR["real_param_count"]


TEXTS = ("[INST] What is shown?\n[/INST] A red circle.", "two  spaces, a\ttab and \u4f60\u597d")


def test_the_tokenizer_cuts_as_sentencepiece_does(tmp_path):
    """``tokenizer.model`` alone, as the model is published: the beginning mark in front, no end mark."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("What is shown? A red circle beside two blue squares.\n" * 3 + "[INST] again [/INST] squares\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    cut = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    (tmp_path / "config.json").write_text(json.dumps(VECTOR["config"] | {"model_type": "Moss2"}))
    tokenizer = get("moss2").tokenizer(tmp_path)
    for text in TEXTS:
        assert tokenizer(text).input_ids == [1, *cut.encode(text)], text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
