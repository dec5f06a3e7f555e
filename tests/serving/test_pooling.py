"""Embeddings are pooled as a directory of sentence-transformers asks for: compared with that library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_helpers import text_of

from lowrank_ops.serving.pooling import MODES, Pooling
from lowrank_ops.serving.rows import Embedding

pytest.importorskip("sentence_transformers")
server = pytest.importorskip("lowrank_ops.server")


def write(model: str, directory: Path, modes: Any, normalize: bool) -> None:
    """A directory in the format of sentence-transformers over a model's files."""
    shutil.copytree(model, directory)
    kinds = ["Transformer", "Pooling", *["Normalize"] * normalize]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else f"{i}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    for module in modules[1:]:
        (directory / module["path"]).mkdir()
    config = {"word_embedding_dimension": 36, **modes}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("modes", "normalize"),
    [
        *(({"pooling_mode": mode}, False) for mode in MODES),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, True),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, True),
    ],
    ids=str,
)
def test_pooling(modes: dict[str, Any], normalize: bool, small_model: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    write(small_model, tmp_path / "model", modes, normalize)
    reference = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    texts = [text_of(n) for n in range(5)]
    given = reference.tokenize(texts)
    with torch.no_grad():
        hidden = reference[0](dict(given))["token_embeddings"]
        expected = reference(dict(given))["sentence_embedding"]
    pooling = Pooling.read(tmp_path / "model")
    assert torch.allclose(pooling(hidden, given["attention_mask"]), expected, atol=1e-5)
    assert pooling.size(36) == expected.shape[1]


def test_a_server_pools_as_its_model_asks(small_model: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    write(small_model, tmp_path / "model", {"pooling_mode": "cls"}, False)
    texts = [text_of(n) for n in range(5)]
    made = server.load(tmp_path / "model", None, quantize=None, capacity_bytes=8 << 20)
    rows = [Embedding(None, ids) for ids in made.tokenize(texts)]
    made.engine.submit(rows)
    got = torch.stack([row.done.result(60) for row in rows])
    assert made.engine.close(60)
    expected = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(texts, convert_to_tensor=True)
    assert torch.allclose(got, expected, atol=1e-5)


def test_dense(small_model: str, tmp_path: Path) -> None:
    """Dense modules, the second after Normalize: the server's embeddings, and their number in what clients may ask."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as m

    parts = [m.Dense(36, 20), m.Normalize(), m.Dense(20, 9, bias=False, activation_function=torch.nn.GELU())]
    model = SentenceTransformer(modules=[m.Transformer(small_model), m.Pooling(36), *parts], device="cpu")
    model.save(str(tmp_path / "model"))
    texts = [text_of(n) for n in range(5)]
    made = server.load(tmp_path / "model", None, quantize=None, capacity_bytes=8 << 20)
    rows = [Embedding(None, ids) for ids in made.tokenize(texts)]
    made.engine.submit(rows)
    got = torch.stack([row.done.result(60) for row in rows])
    assert made.engine.close(60) and made.engine.pooling.size(36) == 9
    assert torch.allclose(got, model.encode(texts, convert_to_tensor=True), atol=1e-5)

    config, weights = (tmp_path / "model" / "2_Dense" / name for name in ("config.json", "model.safetensors"))
    written = json.loads(config.read_text())
    for change, message in (
        ({"in_features": 30}, "size mismatch"),
        ({"activation_function": "os.getcwd"}, "activation of a Dense module must be one of torch.nn, got os.getcwd"),
        ({"activation_function": "torch.nn.modules.linear.Linear"}, "must be one of torch.nn"),
        ({"use_residual": True}, "with a residual"),
        ({"module_input_name": "token_embeddings"}, "of something else than the embedding"),
    ):
        config.write_text(json.dumps(written | change))
        with pytest.raises(server.ServeError, match=message):
            server.load(tmp_path / "model", None)
    config.write_text(json.dumps(written))
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(server.ServeError, match="is damaged"):
        server.load(tmp_path / "model", None)
    shutil.rmtree(tmp_path / "model" / "2_Dense")
    shutil.copytree(tmp_path / "model" / "4_Dense", tmp_path / "model" / "2_Dense")
    with pytest.raises(server.ServeError, match="takes 20 numbers, and 36 come to it"):
        server.load(tmp_path / "model", None)


def test_refusals(small_model: str, tmp_path: Path) -> None:
    write(small_model, tmp_path / "model", {"pooling_mode": "middle"}, False)
    with pytest.raises(server.ServeError, match="pooling must be some of cls, .*, got middle"):
        server.load(tmp_path / "model", None)
    for kinds, message in (
        (["LayerNorm"], "asks for LayerNorm; a Transformer"),
        (["Normalize", "Pooling"], "asks for Pooling after other modules"),
    ):
        modules = [{"type": f"sentence_transformers.models.{kind}", "path": f"1_{kind}"} for kind in kinds]
        (tmp_path / "model" / "modules.json").write_text(json.dumps(modules))
        with pytest.raises(server.ServeError, match=message):
            server.load(tmp_path / "model", None)
