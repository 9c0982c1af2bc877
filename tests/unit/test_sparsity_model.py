"""A sparsified model: equal to the dense one when it keeps all, the same alone and in a batch, in every family."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from tiny_llava import IMAGE_TOKEN, PAD, batch, llava
from torch import Tensor

from mmpipe.errors import ConfigError, DataError
from mmpipe.models.moe.spec import MoESettings
from mmpipe.models.moe.upcycle import upcycle
from mmpipe.models.sparsity.context import KEYWORD, TrainingPass
from mmpipe.models.sparsity.hooks import FAMILIES, get_sparsifier, set_keep_rate, sparsify, without_sparsity
from mmpipe.models.sparsity.record import recording
from mmpipe.models.sparsity.segments import Segments, of_batch
from mmpipe.models.sparsity.sparsifier import retained_tokens
from mmpipe.models.sparsity.spec import SparsitySettings

SMALL = {"d_model": 16, "nhead": 4, "dim_feedforward": 32}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "mixtral": transformers.MixtralConfig,
    "phi3": transformers.Phi3Config,
    "qwen2": transformers.Qwen2Config,
    "qwen2_moe": transformers.Qwen2MoeConfig,
    "qwen3": transformers.Qwen3Config,
}


def settings(**changes: Any) -> SparsitySettings:
    return SparsitySettings(**{**SMALL, "vision_keep_rate": 0.5, **changes})


def sparse(kind: str = "llama", *, text: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A model with predictors whose decisions vary from token to token."""
    import tiny_llava

    tiny_llava.TEXT |= CONFIGS
    extra = {k: v for k, v in EXPERTS.items() if hasattr(CONFIGS[kind](), k)}
    model = llava(kind, **extra, **(text or {}))
    liven(sparsify(model, settings(**changes)))
    return model


def liven(sparsifier: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in sparsifier.parameters():
        if parameter.ndim > 1:  # biases would decide for all tokens alike
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def greedy(model: Any, steps: int = 6, **given: Any) -> tuple[Tensor, Tensor]:
    """Tokens and logits of greedy decoding."""
    out = model.generate(
        **given,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, -steps:], torch.stack(out.logits, 1)


def rows(given: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch without its padding; images of rows before it are skipped."""
    real = given["attention_mask"][row].bool()
    before = int((given["input_ids"][:row] == IMAGE_TOKEN).sum()) // 4
    own = int((given["input_ids"][row] == IMAGE_TOKEN).sum()) // 4
    one = {"input_ids": given["input_ids"][row : row + 1, real], "attention_mask": torch.ones(1, int(real.sum()))}
    return one | ({"pixel_values": given["pixel_values"][before : before + own]} if own else {})


def mixed() -> dict[str, Tensor]:
    """Rows with one image, two images, none; of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(5)
    places = ((2,), (1, 7), (), (9,))
    lengths = (11, 18, 7, 14)
    ids, mask = torch.full((4, 18), PAD), torch.zeros(4, 18, dtype=torch.long)
    for row, (starts, length) in enumerate(zip(places, lengths, strict=True)):
        tokens = torch.randint(3, 250, (length,), generator=generator)
        for start in starts:
            tokens[start : start + 4] = IMAGE_TOKEN
        ids[row, -length:], mask[row, -length:] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(4, 3, 28, 28, generator=generator)}


@pytest.mark.parametrize("kind", FAMILIES)
def test_keeping_everything_is_the_dense_model(kind: str) -> None:
    model = sparse(kind, vision_keep_rate=1.0, output_text_keep_rate=1.0)
    given = batch(padded=0)
    with without_sparsity(model):
        expected = greedy(model, **given)
    tokens, logits = greedy(model, **given)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logits, expected[1], rtol=0, atol=1e-5)
    # the same through the pruned cache: images whole, and a text predictor that keeps all
    get_sparsifier(model).settings = settings(vision_keep_rate=0.999, sparse_layer=2)
    get_sparsifier(model).image_score_predictor = None
    get_sparsifier(model).retain_answer = lambda hidden, real: real
    tokens, logits = greedy(model, **given)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logits, expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_batch_is_its_rows(kind: str) -> None:
    model, given = sparse(kind), mixed()
    with recording(model) as together:
        tokens, logits = greedy(model, **given)
    dropped = False
    for row in range(len(tokens)):
        with recording(model) as alone:
            own_tokens, own_logits = greedy(model, **rows(given, row))
        assert torch.equal(own_tokens[0], tokens[row])
        torch.testing.assert_close(own_logits[0], logits[row], rtol=1e-4, atol=1e-4)
        for one, many in zip(alone.passes, together.passes, strict=True):
            assert one.keep[0] == many.keep[row]
            assert one.cached[0] == many.cached[row]
            assert one.cached_whole[0] == many.cached_whole[row]
            dropped |= not one.prompt and not one.keep[0][0]
    assert dropped, "no token was dropped while decoding: nothing was tested"


def dense_reference(model: Any, given: dict[str, Tensor], record: Any) -> Tensor:
    """Logits of the dense weights in one pass, keys hidden by what was recorded: what pruning must compute.

    Dropped prompt tokens are hidden from all others behind the sparse layer, dropped generated ones from later ones.
    """
    text, first = model.model.language_model, get_sparsifier(model).settings.sparse_layer
    keep = torch.tensor([kept for done in record.passes for kept in done.keep[0]])
    length = len(keep)
    hidden_keys = torch.ones(length, length).tril().bool() & (keep | torch.eye(length).bool())
    seen = []
    for index, layer in enumerate(text.layers):
        if index >= first:
            mask = torch.zeros(1, 1, length, length).masked_fill(~hidden_keys, -1e9)
            seen.append(
                layer.register_forward_pre_hook(
                    lambda m, a, k, mask=mask: (a, k | {"attention_mask": mask}), with_kwargs=True
                )
            )
    with without_sparsity(model), torch.no_grad():
        logits = model(**given, use_cache=False).logits
    for handle in seen:
        handle.remove()
    return logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pruning_is_a_mask_over_keys(attention: str) -> None:
    model, given = sparse(), rows(mixed(), 1)
    model.set_attn_implementation(attention)
    with recording(model) as record:
        tokens, logits = greedy(model, **given)
    assert record.passes[0].computed == [18 - 2 * 2]
    longer = torch.cat([given["input_ids"], tokens[:, :-1]], 1)
    expected = dense_reference(model, given | {"input_ids": longer, "attention_mask": torch.ones_like(longer)}, record)
    torch.testing.assert_close(logits[0], expected[0, -len(logits[0]) :], rtol=1e-4, atol=1e-5)


def test_a_window_counts_true_positions() -> None:
    model, given = sparse("mistral", text={"sliding_window": 8}), rows(mixed(), 1)
    with recording(model) as record:
        _, logits = greedy(model, 1, **given)
    keep = torch.tensor(record.passes[0].keep[0])
    distance = torch.arange(18)[:, None] - torch.arange(18)
    seen = (distance >= 0) & (distance < 8)
    for index, layer in enumerate(model.model.language_model.layers):
        allowed = seen & (keep | torch.eye(18).bool()) if index >= 2 else seen
        mask = torch.zeros(1, 1, 18, 18).masked_fill(~allowed, -1e9)
        layer.register_forward_pre_hook(lambda m, a, k, mask=mask: (a, k | {"attention_mask": mask}), with_kwargs=True)
    with without_sparsity(model), torch.no_grad():
        expected = model(**given, use_cache=False).logits[:, -1]
    torch.testing.assert_close(logits[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_beams_carry_their_own_cache() -> None:
    model, given = sparse(), rows(mixed(), 0)
    found = model.generate(**given, num_beams=3, max_new_tokens=5, do_sample=False)
    again = model.generate(**given, num_beams=3, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, again), "something stayed in the model"


def test_questions_can_be_dropped_too() -> None:
    model = sparse(use_instruct_predictor=True)
    with recording(model) as record:
        model.generate(**mixed(), max_new_tokens=2, do_sample=False)
    first = record.passes[0]
    texts = [kept[-5:] for kept in first.keep]
    assert all(kept[-1] for kept in texts), "the last token of a prompt stays"
    assert not all(all(kept) for kept in texts), "no token of a question was dropped: nothing was tested"
    assert all(first.keep[2]), "a text without images stays whole"


def test_experts_see_what_is_left() -> None:
    model = upcycle(llava("qwen2"), MoESettings())
    for layer in model.model.language_model.layers[::2]:
        generator = torch.Generator().manual_seed(1)
        for parameter in layer.mlp.experts.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    liven(sparsify(model, settings()))
    given = mixed()
    tokens, logits = greedy(model, **given)
    for row in range(len(tokens)):
        own_tokens, own_logits = greedy(model, **rows(given, row))
        assert torch.equal(own_tokens[0], tokens[row])
        torch.testing.assert_close(own_logits[0], logits[row], rtol=1e-4, atol=1e-4)


def test_the_cache_is_as_large_as_predicted() -> None:
    model, given = sparse(), rows(mixed(), 0)
    with recording(model) as record, torch.no_grad():
        out = model(**given, use_cache=True)
        cache, kept = out.past_key_values, 0
        for token in range(3, 250, 20):
            ids = torch.tensor([[token]])
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            kept += record.passes[-1].keep[0][0]
    fed = len(record.passes) - 1
    assert 0 < kept < fed, kept
    text = model.config.text_config
    a_token = 2 * text.num_key_value_heads * text.hidden_size // text.num_attention_heads * 4
    # two layers hold everything, two what is kept: of the image half, of the rest of the prompt all
    expected = a_token * (2 * (11 + fed) + 2 * (11 - 2 + kept))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == expected
    assert [layer.keys.untyped_storage().nbytes() for layer in cache.layers] == [
        layer.keys.nbytes for layer in cache.layers
    ]


def test_an_image_keeps_at_least_one_token() -> None:
    assert [retained_tokens(576, rate) for rate in (0.2, 0.001)] == [115, 1]
    model, given = sparse(vision_keep_rate=0.1), rows(mixed(), 1)
    with recording(model) as record:
        greedy(model, 1, **given)
    assert kept_by_image(record, given) == [1, 1]


def kept_by_image(record: Any, given: dict[str, Tensor]) -> list[int]:
    """How many tokens of each image of one row were kept."""
    keep = torch.tensor(record.passes[0].keep[0])
    return keep[given["input_ids"][0] == IMAGE_TOKEN].view(-1, 4).sum(1).tolist()


def test_every_image_of_a_sample_is_judged_by_itself() -> None:
    model, given = sparse(), rows(mixed(), 1)
    with recording(model) as record:
        greedy(model, 1, **given)
    assert kept_by_image(record, given) == [2, 2], "the rate holds for each image"
    # the same two images in one row and in a row each: the same decisions, in generation and in training
    sparsifier, generator = get_sparsifier(model), torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 6, 32, generator=generator) * torch.tensor([1.0, 5.0])[:, None, None]
    noise = torch.randn(2, 6, 2, generator=generator)
    images = torch.tensor([[False, True, True, True, True, False]]).repeat(2, 1)
    one_row = hidden.view(1, 12, 32), images.view(1, 12)
    apart = sparsifier.retain_prompt(hidden, torch.ones_like(images), images, True)
    together = sparsifier.retain_prompt(one_row[0], torch.ones_like(one_row[1]), one_row[1], True)
    assert torch.equal(together.view(2, 6), apart)
    nothing = torch.zeros_like(images)
    drawn = sparsifier.draw(hidden, Segments(images, nothing, nothing), 1.0, noise)[0]
    both = Segments(one_row[1], nothing.view(1, 12), nothing.view(1, 12))
    assert torch.equal(sparsifier.draw(one_row[0], both, 1.0, noise.view(1, 12, 2))[0].view(2, 6), drawn)
    assert 0 < drawn[images].sum() < 8


# ---- training


def training_batch() -> tuple[dict[str, Tensor], Tensor]:
    given = batch(padded=3)
    labels = torch.full_like(given["input_ids"], -100)
    labels[:, 9:] = given["input_ids"][:, 9:]
    labels[given["attention_mask"] == 0] = -100
    return given, labels


def one_step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """A forward and backward pass in training; hidden states and gradients."""
    given, labels = training_batch()
    found = of_batch(given["input_ids"], labels, given["attention_mask"], IMAGE_TOKEN)
    model.train()
    model.zero_grad()
    noise = torch.randn(*labels.shape, 2, generator=torch.Generator().manual_seed(0))
    current = TrainingPass(found, noise)
    features = torch.cat(list(model.model.get_image_features(pixel_values=given["pixel_values"]).pooler_output))
    embeddings = model.get_input_embeddings()(given["input_ids"])
    embeddings = embeddings.masked_scatter((given["input_ids"] == IMAGE_TOKEN)[..., None], features)
    hidden = model.model(
        inputs_embeds=embeddings, attention_mask=given["attention_mask"], use_cache=False, **{KEYWORD: current}
    ).last_hidden_state
    (hidden.square().mean() + sum(d.mean() for d in current.decisions.values())).backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradients_reach_the_predictors_and_survive_checkpointing() -> None:
    model = sparse(output_text_len_for_training=2)
    hidden, gradients = one_step(model)
    predictors = [n for n, _ in model.named_parameters() if "sparsifier" in n]
    assert all(gradients[name].abs().max() > 0 for name in predictors)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, checkpointed = one_step(model)
    torch.testing.assert_close(again, hidden)
    assert checkpointed.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-7)


def test_predictors_count_as_used_when_a_batch_has_nothing_for_them() -> None:
    model = sparse()
    given, _ = training_batch()
    text_only = given["input_ids"].masked_fill(given["input_ids"] == IMAGE_TOKEN, 9)
    labels = torch.full_like(text_only, -100)
    found = of_batch(text_only, labels, given["attention_mask"], IMAGE_TOKEN)
    current = TrainingPass(found, torch.zeros(*labels.shape, 2))
    model.train()
    out = model.model(
        inputs_embeds=model.get_input_embeddings()(text_only),
        attention_mask=given["attention_mask"],
        use_cache=False,
        **{KEYWORD: current},
    )
    out.last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in get_sparsifier(model).parameters())
    assert current.decisions == {}


def test_padding_is_masked_in_every_layer_of_training() -> None:
    """Padding on the left, which causality does not hide: rows compute what they compute without it."""
    model, width = sparse(output_text_len_for_training=2).train(), 3
    given = batch(padded=0)
    labels = torch.full_like(given["input_ids"], -100)
    labels[:, 9:] = given["input_ids"][:, 9:]
    noise = torch.randn(*labels.shape, 2, generator=torch.Generator().manual_seed(0))
    embeddings = torch.randn(*labels.shape, 32, generator=torch.Generator().manual_seed(1))

    def hidden(padding: int) -> list[Tensor]:
        """Hidden states behind every layer, those of padding left out."""

        def padded(values: Tensor, by: float) -> Tensor:
            return torch.cat([values.new_full((len(values), padding, *values.shape[2:]), by), values], 1)

        ids, mask = padded(given["input_ids"], PAD), padded(given["attention_mask"], 0)
        found = of_batch(ids, padded(labels, -100), mask, IMAGE_TOKEN)
        current = TrainingPass(found, padded(noise, 0.0))
        text, seen = model.model.language_model, []
        hooks = [layer.register_forward_hook(lambda m, a, out: seen.append(out[:, padding:])) for layer in text.layers]
        arguments = {"inputs_embeds": padded(embeddings, 3.0), "attention_mask": mask, "use_cache": False}
        model.model(**arguments, **{KEYWORD: current})
        for hook in hooks:
            hook.remove()
        return seen

    for layer, (alone, behind_padding) in enumerate(zip(hidden(0), hidden(width), strict=True)):
        torch.testing.assert_close(behind_padding, alone, rtol=1e-4, atol=1e-4, msg=f"layer {layer} sees padding")


def test_segments_follow_the_labels() -> None:
    ids = torch.tensor([[5, 1, 1, 6, 7, 8, 9, 6, 7, 8, 9, 2], [5, 6, 7, 8, 9, 2, 2, 2, 2, 2, 2, 2]])
    labels = torch.full_like(ids, -100)
    labels[0, 5:7], labels[0, 9:11], labels[1, 3:5] = 0, 0, 0
    mask = torch.tensor([[1] * 12, [1] * 5 + [0] * 7])
    found = of_batch(ids, labels, mask, 1)
    assert found.images_BL.nonzero().tolist() == [[0, 1], [0, 2]]
    assert found.answers_BL.nonzero().tolist() == [[0, 9], [0, 10], [1, 3], [1, 4]]
    assert found.questions_BL.nonzero().tolist() == [[0, 7], [0, 8]]


# ---- what cannot be


def test_what_cannot_be_sparsified() -> None:
    with pytest.raises(ConfigError, match=r"sparse_layer: 4: the language model has the layers 0 to 3"):
        sparsify(llava(), settings(sparse_layer=4))
    model = sparse()
    with pytest.raises(ConfigError, match="has predictors already"):
        sparsify(model, settings())
    with pytest.raises(ConfigError, match=r"the checkpoint has no predictors"):
        set_keep_rate(llava(), 0.5, "run+keep0.5")
    with pytest.raises(ConfigError, match=r"above 0 and at most 1, not 1.5"):
        set_keep_rate(model, 1.5, "run+keep1.5")
    strange = llava()
    strange.model.language_model.config.model_type = "gpt_strange"
    with pytest.raises(ConfigError, match=r"'gpt_strange' cannot be sparsified; those that can: llama, mistral"):
        sparsify(strange, settings())


@pytest.mark.parametrize("rate", [0, -0.1, 1.1])
def test_keep_rates_lie_above_0_and_at_most_at_1(rate: float) -> None:
    with pytest.raises(ValueError, match="vision_keep_rate"):
        SparsitySettings(vision_keep_rate=rate)


def test_images_of_another_token_count_are_refused() -> None:
    model = sparse()
    get_sparsifier(model).image_tokens = 3
    with pytest.raises(DataError, match=r"4\] image tokens do not hold whole images of 3 tokens"):
        model(**batch(padded=0), use_cache=False)


def test_a_copied_model_is_whole() -> None:
    model, given = sparse(), rows(mixed(), 1)
    assert torch.equal(greedy(deepcopy(model), **given)[0], greedy(model, **given)[0])
