"""Moments as data: what is refused, shrinkage of experts, and files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lowrank_ops as lo
from lowrank_ops.formats import Moment, Moments
from lowrank_ops.formats.moments import fingerprint


def sample(N: int = 9, K: int = 12, T: int = 40, seed: int = 0) -> tuple[torch.Tensor, Moment]:
    """A weight, and the moments of random rows for it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator)
    return weight, Moment.of(torch.randn(T, K, generator=generator) + 0.5, weight)


def stack(counts: tuple[int, ...] = (30, 2, 0), N: int = 5, K: int = 8) -> tuple[torch.Tensor, Moment]:
    """A stack of experts, and the moments of random rows for it."""
    weight = torch.randn(len(counts), N, K, generator=torch.Generator().manual_seed(0))
    rows = [torch.randn(T, K, generator=torch.Generator().manual_seed(T)) for T in counts]
    second = torch.stack([x.T @ x / max(len(x), 1) for x in rows])
    mean = torch.stack([x.sum(0) / max(len(x), 1) for x in rows])
    return weight, Moment(second, mean, torch.tensor(counts), tuple(weight.shape), fingerprint(weight))


def layer(weight: torch.Tensor) -> torch.nn.Linear:
    made = torch.nn.Linear(weight.shape[1], weight.shape[0])
    made.weight.data = weight.clone()
    return made


def test_moments_of_rows() -> None:
    x = torch.randn(7, 4)
    moment = Moment.of(x, torch.ones(3, 4))
    torch.testing.assert_close(moment.second.double(), sum(row.outer(row) for row in x.double()) / 7)
    torch.testing.assert_close(moment.mean, x.mean(0))
    assert (int(moment.count), moment.shape) == (7, (3, 4))
    with pytest.raises(ValueError, match=r"x must be \[T, 4\]"):
        Moment.of(torch.randn(7, 5), torch.ones(3, 4))


def test_check_takes_the_weight_it_was_gathered_beside_in_any_precision() -> None:
    weight, moment = sample(64, 64)
    for same in (weight, weight.bfloat16(), lo.NF4Weight.quantize(weight), weight + 0.1 * torch.randn(64, 64)):
        moment.check(same, "layer")
    weight, moment = stack()
    moment.check(weight, "experts")
    moment[0].check(weight[0], "experts.0")


def test_check_names_the_layer_and_what_is_wrong() -> None:
    weight, moment = sample()
    wrong = {
        r"its moments are of a weight \[9, 12\], and the weight is \[9, 13\]": (moment, torch.ones(9, 13)),
        "beside another weight": (moment, sample(seed=1)[0]),
        "saw no token": (replace(moment, count=torch.tensor(0)), weight),
        "second must be finite": (replace(moment, second=moment.second * torch.nan), weight),
        "mean must be finite": (replace(moment, mean=moment.mean * torch.inf), weight),
        "second must be float32": (replace(moment, second=moment.second[:3]), weight),
        "on its diagonal": (replace(moment, second=-moment.second), weight),
        "symmetric": (replace(moment, second=moment.second.triu()), weight),
        "too large": (replace(moment, second=2 * moment.second - moment.second.diag().diag()), weight),
    }
    for message, (bad, w) in wrong.items():
        with pytest.raises(ValueError, match=f"^model.layer.*{message}"):
            bad.check(w, "model.layer")
    weight, moment = stack((0, 0))
    with pytest.raises(ValueError, match="^experts saw no token"):
        moment.check(weight, "experts")
    weight, moment = stack()
    with pytest.raises(ValueError, match="beside another weight"):
        moment.check(weight[[1, 0, 2]], "experts")


def test_check_takes_inputs_whose_squares_are_zero_in_float32() -> None:
    x = torch.randn(8, 12)
    x[:, 3] *= 1e-25  # a feature that training has decayed
    weight = torch.randn(9, 12)
    for moment in (Moment.of(x, weight), lo.calibrate(torch.nn.Sequential(layer(weight)), [{"input": x}])["0"]):
        assert moment.second[3, 3] == 0 and moment.second[3, 4] != 0
        moment.check(weight, "model.layer")
        lo.adapt(
            torch.nn.Sequential(layer(weight)), lo.LoRA(2), quantize=lo.NF4Config(calibration=Moments({"0": moment}))
        )


def test_a_rarely_routed_expert_shrinks_towards_the_mean_of_all() -> None:
    weight, moment = stack((30, 2, 0))
    pool = (30 * moment.second[0] + 2 * moment.second[1]) / 32
    shrunk = moment.shrunk(10)
    torch.testing.assert_close(shrunk.second[1], (2 * moment.second[1] + 10 * pool) / 12)
    torch.testing.assert_close(shrunk.second[2], pool)
    torch.testing.assert_close(
        shrunk.mean[0], (30 * moment.mean[0] + 10 * (30 * moment.mean[0] + 2 * moment.mean[1]) / 32) / 40
    )
    assert shrunk.count.tolist() == [30, 2, 0]
    shrunk.check(weight, "experts")
    alone = moment.shrunk(0)
    torch.testing.assert_close(alone.second[:2], moment.second[:2])
    torch.testing.assert_close(alone.second[2], pool)
    torch.testing.assert_close(moment.shrunk().second, moment.shrunk(2).second)  # K / 4
    matrix = sample()[1]
    assert matrix.shrunk() is matrix
    with pytest.raises(ValueError, match="strength must be at least 0"):
        moment.shrunk(-1)


def test_files_keep_everything_and_store_a_shared_tensor_once(tmp_path: Path) -> None:
    weight, moment = sample()
    sibling = replace(moment, shape=(3, 12), fingerprint=fingerprint(weight[:3]), gradient=torch.ones(3, 12))
    moments = Moments({"q": moment, "k": sibling, "experts": stack()[1]})
    moments.save(tmp_path / "moments.safetensors")
    loaded = Moments.load(tmp_path / "moments.safetensors")
    assert list(loaded) == ["q", "k", "experts"] and loaded.nbytes == moments.nbytes
    assert loaded["k"].second is loaded["q"].second
    for name, held in moments.items():
        again = loaded[name]
        assert again.shape == held.shape
        for what in ("second", "mean", "count", "fingerprint", "gradient"):
            torch.testing.assert_close(getattr(again, what), getattr(held, what), rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["moments.safetensors"]
    Moments({"other": sample(seed=1)[1]}).save(tmp_path / "more.safetensors")
    assert list(Moments.load(tmp_path)) == ["q", "k", "experts", "other"]


def test_files_that_hold_no_moments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="moments must be a file"):
        Moments.load(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match="is damaged"):
        Moments.load(tmp_path / "x.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="holds no moments"):
        Moments.load(tmp_path / "x.safetensors")
