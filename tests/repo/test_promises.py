"""What docstrings promise under Raises: the class, and a message that names the argument and what came. What help tells."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import plain

import lowrank_ops as lo
from lowrank_ops import functional as F
from lowrank_ops import preference, scaling_laws
from lowrank_ops.__main__ import main

UPDATE = lo.LowRankUpdate(torch.ones(2, 64), torch.ones(32, 2))
TRAINED = lo.LowRankUpdate(torch.ones(2, 64, requires_grad=True), torch.ones(32, 2))
FACTORS = torch.ones(2, 64), torch.ones(32, 2)
X, W = torch.ones(3, 64), torch.ones(32, 64)
SLOTS = torch.zeros(3, dtype=torch.int32)
RUNS = scaling_laws.Runs(np.geomspace(1e6, 1e8, 8), np.geomspace(1e8, 1e9, 8), np.linspace(4, 2, 8))


def enter(context: Any) -> None:
    with context:
        pass


TAKERS: dict[str, Callable[[Any], Any]] = {
    "adapt": lambda model: lo.adapt(model, lo.LoRA(2)),
    "adapter_parameters": lo.adapter_parameters,
    "calibrate": lambda model: lo.calibrate(model, [X]),
    "count_parameters": scaling_laws.count_parameters,
    "disabled": lambda model: enter(lo.disabled(model)),
    "find_reads": lo.find_reads,
    "load_adapter": lambda model: lo.load_adapter(model, {}),
    "make_shardable": lo.make_shardable,
    "merge": lo.merge,
    "parallelize": lambda model: lo.parallelize(model, None),
    "parameter_groups": lambda model: lo.parameter_groups(model, lr=1.0, lr_up=1.0),
    "pool": lo.AdapterPool,
    "reference": lo.reference,
    "save_adapter": lambda model: lo.save_adapter(model, "unused"),
    "save_reward_model": lambda model: preference.save_reward_model(model, "unused"),
    "set_strength": lambda model: lo.set_strength(model, 1.0),
    "strength": lambda model: enter(lo.strength(model, 1.0)),
    "train_tokens": lambda model: lo.train_tokens(model, [1]),
}


@pytest.mark.parametrize("name", TAKERS)
def test_what_is_no_model_is_refused_by_name(name: str) -> None:
    with pytest.raises(TypeError, match=r"^model must be a .*, got Tensor$"):
        TAKERS[name](torch.ones(2, 2))


PATHS: dict[str, Callable[[Any], Any]] = {
    "adapter": lambda path: lo.load_adapter(plain(), path),
    "factors": lambda path: lo.adapt(plain(), lo.SVF(), factors=path),
    "moments": lo.Moments.load,
    "root": lambda path: lo.AdapterPool(lo.adapt(plain(), None), root=path),
}


@pytest.mark.parametrize("name", PATHS)
def test_what_is_no_path_is_refused_by_name(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}.* must be a path.*, got int"):
        PATHS[name](3)


REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "a factor of integers": (
        TypeError,
        "down must be .*int64",
        lambda: lo.LowRankUpdate(FACTORS[0].long(), FACTORS[1]),
    ),
    "scale of text": (TypeError, "scale must be a number, got str", lambda: lo.LowRankUpdate(*FACTORS, None, "2")),
    "a layer of integers": (TypeError, "dtype must be .*int8", lambda: lo.Linear(64, 32, dtype=torch.int8)),
    "a row that is not there": (
        IndexError,
        "index must be from 0 to 31, got 5 to 32",
        lambda: lo.NF4Weight.quantize(W).dequantize_rows(torch.tensor([5, 32])),
    ),
    "a weight of text": (TypeError, "must be a number, got '1'", lambda: lo.combine([(UPDATE, "1")])),
    "routed factors that train": (ValueError, "no gradient", lambda: F.routed_linear(X, W, [TRAINED], SLOTS)),
    "a routed weight that trains": (
        ValueError,
        "no gradient",
        lambda: F.routed_linear(X, W.clone().requires_grad_(), [UPDATE], SLOTS),
    ),
    "moments of numbers": (TypeError, r"moments\['a'\] must be a Moment, got int", lambda: lo.Moments({"a": 3})),
    "bytes of text": (
        TypeError,
        "capacity_bytes must be an integer, got '1'",
        lambda: lo.AdapterPool(lo.adapt(plain(), None), "1"),
    ),
    "no mesh": (TypeError, "mesh must be a DeviceMesh, got NoneType", lambda: lo.parallelize(plain(), None)),
    "a head of nothing": (ValueError, "hidden_size .* got 0", lambda: preference.RewardHead(0)),
    "no mask": (
        TypeError,
        "attention_mask must be a Tensor",
        lambda: preference.RewardHead(4)(torch.ones(1, 2, 4), None),
    ),
    "a gap of integers": (TypeError, "gap must be .*int64", lambda: preference.win_probability(torch.tensor([1]))),
    "no steps": (
        ValueError,
        "max_iterations .* got 0",
        lambda: preference.fit_bradley_terry([[0, 1], [1, 0]], max_iterations=0),
    ),
    "no runs": (TypeError, "runs must be Runs, got list", lambda: scaling_laws.fit([])),
    "delta of text": (TypeError, "delta must be a number, got '1'", lambda: scaling_laws.fit(RUNS, delta="1")),
    "a constant of text": (ValueError, "A must be a number .*got 'x'", lambda: scaling_laws.Chinchilla(A="x")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_promised_error_comes(what: str) -> None:
    kind, message, call = REFUSED[what]
    with pytest.raises(kind, match=message):
        call()


def test_a_file_is_not_written_over_a_folder(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    with pytest.raises(OSError, match=r"was not written .*directory"):
        lo.Moments({}).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """The name of a command and each of its options, and the same of its subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options(command)
        elif action.option_strings:
            yield parser.prog, action


def test_help_tells_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    parsers: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(SystemExit):
        main(["info"])
    found = list(options(parsers[0]))
    assert len(found) > 100
    silent = [
        f"{command} {action.option_strings[-1]} has {action.default!r}"
        for command, action in found
        if action.default not in (None, False, [], argparse.SUPPRESS) and "default" not in (action.help or "")
    ]
    assert not silent
