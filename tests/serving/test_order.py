"""A route gives each row its adapter where a layer's input is not [B, T, K], or refuses the layer by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lowrank_ops as lo

NAMES = ["a", None, "b"]
TEXT: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., None]:
    """Compare each row of a routed batch with the model that has this row's adapter for all rows."""

    def run(
        make: Callable[[], Any], batch: Mapping[str, Any], names: Sequence[str | None] = NAMES, **options: Any
    ) -> None:
        forward = options.pop("forward", lambda model: model(**batch)[0])
        base = lo.adapt(make(), None, **options)
        pool, wanted = lo.AdapterPool(base, 1 << 22), {}
        with torch.no_grad():
            for seed, name in enumerate(["a", "b", None]):
                model = lo.adapt(make(), None if name is None else lo.LoRA(4), **options)
                torch.manual_seed(seed)
                if name is not None:
                    for parameter in lo.adapter_parameters(model):
                        nn.init.normal_(parameter, std=0.3)
                    lo.save_adapter(model, tmp_path / name)
                    pool.load(name, tmp_path / name)
                wanted[name] = forward(model)
            with pool.route(names):
                got = forward(base)
        assert not torch.allclose(wanted["a"], wanted["b"], atol=1e-3)
        each = len(got) // len(names)  # beams
        want = torch.cat([wanted[name][row * each : (row + 1) * each] for row, name in enumerate(names)])
        torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)

    return run


def made(kind: Any, config: Any) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        model = kind(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.2)
        return model

    return make


def ids(T: int) -> Tensor:
    return torch.randint(4, 90, (3, T), generator=torch.Generator().manual_seed(T))


@pytest.mark.parametrize("T", [3, 5])
def test_models_that_hand_tokens_first_to_their_layers(T: int, check: Callable[..., None]) -> None:
    config = transformers.XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=2, d_inner=48)
    check(made(transformers.XLNetModel, config), {"input_ids": ids(T)})


@pytest.mark.parametrize("T", [3, 5])
@pytest.mark.parametrize("batch_first", [False, True])
def test_torchs_encoder_has_tokens_first_unless_told(T: int, batch_first: bool, check: Callable[..., None]) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(32, 2, 48, 0.0, batch_first=batch_first)
            self.inside = nn.TransformerEncoder(layer, 2)

        def forward(self, x: Tensor) -> list[Tensor]:
            y: Tensor = self.inside(x if batch_first else x.transpose(0, 1))
            return [y if batch_first else y.transpose(0, 1)]

    torch.manual_seed(0)
    encoder = Encoder().eval()
    check(lambda: copy.deepcopy(encoder), {"x": torch.randn(3, T, 32)})


T5 = transformers.T5Config(
    d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0, pad_token_id=0,
)  # fmt: skip


def test_beams_of_an_encoder_with_a_decoder(check: Callable[..., None]) -> None:
    how = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    names = [name for name in NAMES for _ in range(2)]
    make = made(transformers.T5ForConditionalGeneration, T5)

    def forward(model: Any) -> Tensor:
        return model.generate(ids(4), **how)

    check(make, {}, names, forward=forward)
    with pytest.raises(ValueError, match=r"layer 'encoder.block.0.layer.0.SelfAttention.q' .* before generate repeats"):
        check(make, {}, ["a", "b", None, "a", "b", None], forward=forward)


def qwen_vl() -> Any:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}},
        vision_config={**vision, "mlp_ratio": 2, "temporal_patch_size": 2}, image_token_id=90, video_token_id=91,
        vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    return made(transformers.Qwen2VLForConditionalGeneration, config)


def pictures(rows: Sequence[Sequence[int]], token: int = 90, width: int = 12) -> dict[str, Tensor]:
    """A batch of rows with pictures of given numbers of placeholders, each of 2 · n by 2 patches."""
    texts = [[5, *(t for n in row for t in [92, *[token] * n, 93]), 6, 7] for row in rows]
    padded = torch.tensor([text + [8] * (width - len(text)) for text in texts])
    grid = torch.tensor([[1, 2 * n, 2] for row in rows for n in row])
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    kind = {90: ("pixel_values", "image_grid_thw", 1), 91: ("pixel_values_videos", "video_grid_thw", 2)}[token]
    return {
        "input_ids": padded,
        kind[0]: pixels,
        kind[1]: grid,
        "mm_token_type_ids": (padded == token).long() * kind[2],
    }


@pytest.mark.parametrize("rows", [[[2], [3], [1]], [[1, 2], [], [3]], [[], [2, 1, 1], []]], ids=str)
def test_pictures_follow_the_row_whose_placeholders_they_fill(
    rows: list[list[int]], check: Callable[..., None]
) -> None:
    check(qwen_vl(), pictures(rows, 90, 16))
    if not rows[1]:
        check(qwen_vl(), pictures(rows, 91, 16))


class Album(nn.Module):
    """Adds the sum of a row's pictures to each of its tokens."""

    config = SimpleNamespace(image_token_id=90)

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.text = nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16))

    def get_decoder(self) -> nn.Module:
        return self.text

    def forward(self, input_ids: Tensor, pixel_values: Tensor, image_grid_thw: Tensor) -> tuple[Tensor]:
        here = (input_ids == 90).unsqueeze(-1)
        x = input_ids.unsqueeze(-1).expand(*input_ids.shape, 16) / 99
        return (self.text(x.masked_scatter(here, self.tower(pixel_values))),)


def test_a_compiled_graph_tells_the_sizes_of_pictures(check: Callable[..., None]) -> None:
    ids = torch.tensor([[90, 90, 5, 90], [5, 6, 7, 8], [4, 90, 90, 90]])
    batch = {
        "input_ids": ids,
        "pixel_values": torch.randn(6, 16),
        "image_grid_thw": torch.tensor([[1, 3, 1], [1, 1, 3]]),
    }

    def forward(model: Any) -> Tensor:
        torch.compiler.reset()
        found: Tensor = torch.compile(model, fullgraph=True, backend="eager")(**batch)[0]
        return found

    torch.manual_seed(0)
    album = Album().eval()
    check(lambda: copy.deepcopy(album), batch, forward=forward)


def test_pictures_that_do_not_fill_the_placeholders_are_refused_by_name(check: Callable[..., None]) -> None:
    batch = pictures([[1, 2], [], [3]], 90, 16)

    def forward(model: Any) -> Tensor:  # a tower alone, and no text that says whose the pictures are
        return model.model.visual(batch["pixel_values"], batch["image_grid_thw"])[0]

    with pytest.raises(
        ValueError, match=r"layer 'model.visual.blocks.0.attn.qkv' takes its input as images, videos or sounds"
    ):
        check(qwen_vl(), batch, forward=forward)


@pytest.mark.parametrize("rows", [[1, 1, 1], [2, 0, 1]], ids=str)
def test_pictures_of_one_size(rows: list[int], check: Callable[..., None]) -> None:
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4, "projection_dim": 16,
    }  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision},
        text_config={"model_type": "llama", **TEXT}, image_token_index=90, image_seq_length=4,
    )  # fmt: skip
    text = torch.tensor([[5, *[90] * (4 * n), *range(6, 20 - 4 * n)] for n in rows])
    pixels = torch.randn(sum(rows), 3, 8, 8)
    check(made(transformers.LlavaForConditionalGeneration, config), {"input_ids": text, "pixel_values": pixels})


def test_windows_follow_one_another(check: Callable[..., None]) -> None:
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=2, num_labels=3
    )
    check(made(transformers.SwinForImageClassification, config), {"pixel_values": torch.randn(3, 3, 16, 16)})


def deberta() -> Any:
    config = transformers.DebertaV2Config(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4, max_position_embeddings=32,
    )  # fmt: skip
    return made(transformers.DebertaV2Model, config)


def switch() -> Any:
    config = transformers.SwitchTransformersConfig(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_heads=2,
        num_experts=2, vocab_size=99, expert_capacity=8, decoder_start_token_id=0, num_decoder_layers=2,
    )  # fmt: skip
    return made(transformers.SwitchTransformersForConditionalGeneration, config)


@pytest.mark.parametrize(
    ("make", "batch", "layer"),
    [
        (deberta(), {"input_ids": ids(5)}, r"'encoder.layer.0.attention.self.pos_key_proj' takes its input as \[B"),
        (
            switch(),
            {"input_ids": ids(5), "decoder_input_ids": ids(4)},
            r"experts.expert_\d.wi' takes its input as tokens that a router",
        ),
    ],
    ids=["one row of positions for all", "tokens that a router has chosen"],
)
def test_equal_names_need_no_rows_and_different_ones_are_refused_by_name(
    make: Any, batch: dict[str, Tensor], layer: str, check: Callable[..., None]
) -> None:
    for name in ("a", "b"):
        check(make, batch, [name] * 3)
    with pytest.raises(ValueError, match=layer):
        check(make, batch)


def test_tokens_that_a_router_has_chosen_have_no_order_of_tokens_either(tmp_path: Path) -> None:
    base = lo.adapt(switch()(), None)
    model = lo.adapt(switch()(), lo.LoRA(4))
    lo.save_adapter(model, tmp_path)
    pool = lo.AdapterPool(base, 1 << 22)
    pool.load("a", tmp_path)
    with torch.no_grad(), pool.route_tokens(["a", None], torch.tensor([0, 1])):
        layer = base.get_submodule("encoder.block.1.layer.1.mlp.experts.expert_0.wi")
        with pytest.raises(ValueError, match="tokens that a router"):
            layer(torch.randn(2, 32))


class Lists(nn.Module):
    """Takes a list of images of several sizes, and joins their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(32, 32)

    def forward(self, x: list[Tensor]) -> tuple[Tensor, ...]:
        return (self.proj(torch.cat(x)),)


def test_a_list_of_rows_is_counted_and_routed_where_all_are_alike(check: Any) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Lists()

    x = [torch.randn(3, 32), torch.randn(3, 32), torch.randn(3, 32)]
    check(make, {"x": x}, ["a"] * 3, forward=lambda model: model(x)[0])
    with pytest.raises(ValueError, match=r"layer 'proj' takes its input as .*cannot be told"):
        check(make, {"x": x}, forward=lambda model: model(x)[0])
    with pytest.raises(ValueError, match="names must have one name for each of the 3 rows, got 2"):
        check(make, {"x": x}, ["a", "a"], forward=lambda model: model(x)[0])
