"""The engine: rows of many adapters in one forward, background loads, added and removed adapters, streamed text."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_helpers import (
    Held,
    alone,
    completion,
    continued,
    fresh,
    greedy,
    replace,
    run,
    size_of,
    text_of,
    tokenizer_of,
    wait_for,
)

import lowrank_ops as lo
from lowrank_ops.serving import store
from lowrank_ops.serving.engine import AdapterError, ClosedError, Engine, QueueFullError, UnknownAdapterError
from lowrank_ops.serving.rows import Embedding, Row


def engine_of_two(model: str, root: Path, names: list[str], folder: Path) -> Engine:
    """An engine over its own folder with copies of two adapters: ``mine`` and ``other``."""
    replace(folder / "mine", root / names[0])
    replace(folder / "other", root / names[1])
    return Engine(lo.adapt(fresh(model), None), folder, causal=True, capacity_bytes=8 << 20, ends=[256])


@pytest.mark.parametrize("causal", [False, True])
def test_a_pool_too_small_for_a_batch(
    causal: bool, small_model: str, causal_model: str, encoder_adapters: Any, causal_adapters: Any
) -> None:
    """Rows whose adapters do not fit next to the others wait for the next forward, and their results are right."""
    model, (root, names) = (causal_model, causal_adapters) if causal else (small_model, encoder_adapters)
    loras = names[::4]
    pool = lo.AdapterPool(lo.adapt(fresh(model), None), 1 << 20)
    pool.load("one", root / loras[0])
    size = pool.stats()["used_bytes"]
    ids = tokenizer_of(model)(text_of(5))["input_ids"]
    observed: list[float] = []
    engine = Engine(
        lo.adapt(fresh(model), None), root, causal=causal, capacity_bytes=int(2.5 * size), ends=[256],
        observe=lambda name, value: observed.append(value) if name == "adapters" else None,
    )  # fmt: skip

    def row_of(name: str) -> Any:
        return greedy(name, ids, 6) if causal else Embedding(name, ids)

    run(engine, [row_of(name) for name in loras])  # so that all are in memory
    observed.clear()
    rows = [row_of(loras[n % 4]) for n in range(12)]
    results = run(engine, rows)
    assert engine.close(60)
    assert max(observed) == 2 and engine.pool.stats()["evictions"] > 0
    for n, name in enumerate(loras):
        reference = alone(model, root, name)
        for i in range(n, 12, 4):
            if causal:
                assert rows[i].drawn == continued(reference, ids, 6)
            else:
                hidden = reference(torch.tensor([ids])).last_hidden_state[0].mean(0)
                assert torch.allclose(results[i], hidden / hidden.norm(), atol=1e-5)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    row = completion([], temperature=1.0, top_p=0.75, seed=0)
    logits = torch.tensor([0.1, 0.3, 0.5, 0.1]).log()
    assert {row.choose(logits) for _ in range(200)} == {1, 2}
    row = completion([], temperature=1.0, seed=0)
    counts = torch.bincount(torch.tensor([row.choose(logits) for _ in range(4000)]), minlength=4) / 4000
    assert torch.allclose(counts, logits.exp(), atol=0.04)  # five standard deviations


@pytest.mark.parametrize(
    ("text", "stops", "expected", "reason"),
    [
        ("plain", (), "plain", "length"),
        ("a – é 🙂 end", (), "a – é 🙂 end", "length"),
        ("one STOP two", ("STOP",), "one ", "stop"),
        ("one STO two", ("STOP",), "one STO two", "length"),
        ("ends in ST", ("STOP",), "ends in ST", "length"),
        ("aab", ("ab",), "a", "stop"),
        ("x🙂y", ("🙂",), "x", "stop"),
        ("abcd", ("cd", "bc"), "a", "stop"),
    ],
)
def test_text_comes_as_it_is_known(text: str, stops: tuple[str, ...], expected: str, reason: str) -> None:
    pieces: list[str] = []
    tokens = list(text.encode())
    row = completion(pieces, stop=stops, max_tokens=len(tokens))
    for token in tokens:
        assert all("\ufffd" not in piece for piece in pieces)
        if row.take(token, frozenset({300})):
            break
    assert ("".join(pieces), row.done.result(0)) == (expected, reason)
    pieces.clear()
    row = completion(pieces, max_tokens=9)
    assert not row.take(0xE2, frozenset({300})) and row.take(300, frozenset({300}))
    assert (pieces, row.done.result(0)) == (["\ufffd"], "stop")  # a character that stayed incomplete


def test_host_memory_has_a_limit(small_model: str, encoder_adapters: tuple[Path, list[str]]) -> None:
    """The least recently used adapter is evicted, and its results are right when it is used again."""
    root, names = encoder_adapters
    a, b, c, d = names[::4]
    size = size_of(small_model, root / a)
    ids = tokenizer_of(small_model)(text_of(5))["input_ids"]
    # Two in the arena and one in host memory.
    options: dict[str, Any] = {"causal": False, "capacity_bytes": int(2.5 * size), "host_bytes": int(1.5 * size)}
    engine = Engine(lo.adapt(fresh(small_model), None), root, **options)
    held: list[set[str]] = []
    for name in (a, b, c, a, d, b):
        row = Embedding(name, ids)
        engine.submit([row])
        hidden = alone(small_model, root, name)(torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert torch.allclose(row.done.result(60), hidden / hidden.norm(), atol=1e-5)
        wait_for(lambda: engine.pool.stats()["host_bytes"] <= 1.5 * size)
        held.append(set(engine.pool.names()))
    assert held == [{a}, {a, b}, {a, b, c}, {a, b, c}, {a, c, d}, {a, b, d}]
    assert engine.close(60) and engine.pool.stats()["loads"] == 5


def test_a_row_that_waits_keeps_its_adapter(causal_model: str, causal_adapters: tuple[Path, list[str]]) -> None:
    """The adapter is loaded once, although host memory may hold nothing and it does not fit next to the running one."""
    root, names = causal_adapters
    options: dict[str, Any] = {"causal": True, "capacity_bytes": int(1.5 * size_of(causal_model, root / names[0]))}
    engine = Engine(lo.adapt(fresh(causal_model), None), root, host_bytes=0, ends=[256], **options)
    rows = [greedy(names[0], [5], 9), greedy(names[4], [5], 9)]
    engine.submit(rows)
    for row in rows:
        row.done.result(60)
        assert row.drawn == continued(alone(causal_model, root, row.adapter), [5], 9)
    assert len(rows[0].drawn) > 4
    assert engine.close(60) and engine.pool.stats()["loads"] == 2 and engine.pool.names() == [names[4]]


def test_a_row_that_waited_and_left_keeps_nothing(causal_model: str, causal_adapters: tuple[Path, list[str]]) -> None:
    """Host memory is freed when the running row ends, even if no new row arrives."""
    root, names = causal_adapters
    options: dict[str, Any] = {"causal": True, "capacity_bytes": int(1.5 * size_of(causal_model, root / names[0]))}
    engine = Engine(lo.adapt(fresh(causal_model), None), root, host_bytes=0, ends=[256], **options)
    held = Held(engine)
    runs, waits = greedy(names[0], [5], 9), greedy(names[4], [5], 9)
    engine.submit([greedy(None, [5], 1)])
    assert held.entered.wait(60)
    engine.submit([runs, waits])
    wait_for(lambda: len(engine._arrived) == 2)
    held.entered.clear()
    held.pass_one()
    assert held.entered.wait(60)
    assert engine.pool.stats()["host_bytes"] > 0
    waits.cancelled = True
    held.go.set()
    runs.done.result(60)
    assert engine.close(60) and waits.done.cancelled()
    assert engine.pool.stats()["host_bytes"] == 0 and engine.pool.names() == [names[0]]


def test_a_client_that_leaves_as_its_adapter_goes(
    causal_model: str, causal_adapters: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """A cancelled row stays in the batch for one more forward; the other rows are not affected."""
    root, names = causal_adapters
    engine = engine_of_two(causal_model, root, names, tmp_path)
    run(engine, [greedy(name, [5], 1) for name in ("mine", "other")])
    held = Held(engine)
    mine, other = greedy("mine", [5], 30), greedy("other", [5], 9)
    engine.submit([mine, other])
    assert held.entered.wait(60)
    held.entered.clear()
    held.pass_one()
    assert held.entered.wait(60)
    shutil.rmtree(tmp_path / "mine")
    mine.cancelled = True
    held.go.set()
    other.done.result(60)
    assert other.drawn == continued(alone(causal_model, root, names[1]), [5], 9) and len(mine.drawn) == 2
    assert engine.close(60) and engine.pool.names() == ["other"]


def test_a_completion_ends_on_the_version_it_began_with(
    causal_model: str, causal_adapters: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """A row that arrives after the change gets the new version, and a row of another adapter does not wait for it."""
    root, names = causal_adapters
    engine = engine_of_two(causal_model, root, names, tmp_path)
    held = Held(engine)
    first, second, other = greedy("mine", [5], 30), greedy("mine", [5], 30), greedy("other", [5], 3)
    engine.submit([first])
    assert held.entered.wait(60)
    held.pass_one()
    wait_for(lambda: first.drawn)
    replace(tmp_path / "mine", root / names[4])
    engine.submit([second, other])
    wait_for(lambda: len(engine._arrived) == 2)
    joined: list[bool] = []
    other.done.add_done_callback(lambda _: joined.append(not first.done.done() and not second.drawn))
    held.go.set()
    for row, name in ((first, names[0]), (second, names[4]), (other, names[1])):
        row.done.result(60)
        assert row.drawn == continued(alone(causal_model, root, name), [5], row.max_tokens), name
    assert first.drawn != second.drawn and joined == [True]
    assert engine.close(60) and engine.pool.stats()["loads"] == 3


def test_rows_of_clients_that_left_are_dropped(causal_model: str) -> None:
    engine = Engine(lo.adapt(fresh(causal_model), None), None, causal=True, capacity_bytes=1 << 20)
    held = Held(engine)
    pieces: list[str] = []
    rows = [completion(pieces, max_tokens=50, temperature=0) for _ in range(3)]
    engine.submit(rows[:2])
    assert held.entered.wait(60)
    engine.submit(rows[2:])
    rows[0].cancelled = rows[2].cancelled = True
    held.go.set()
    assert rows[1].done.result(60) == "length" and len(rows[0].drawn) == 1 and rows[2].drawn == []
    assert engine.close(60)


# ---- loads ----


class HeldReading:
    """An adapter whose read has finished, but blocks until the test releases it."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        read = store.read_updates

        def slow(layers: Any, source: Any, *rest: Any) -> Any:
            try:
                return read(layers, source, *rest)
            finally:
                if source.name == name:
                    self.entered.set()
                    assert self.go.wait(60)

        monkeypatch.setattr(store, "read_updates", slow)


@pytest.mark.parametrize("causal", [False, True])
def test_a_load_holds_only_its_own_rows_up(
    causal: bool,
    small_model: str,
    causal_model: str,
    encoder_adapters: Any,
    causal_adapters: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, (root, names) = (causal_model, causal_adapters) if causal else (small_model, encoder_adapters)
    there, slow = names[:2]
    engine = Engine(
        lo.adapt(fresh(model), None), root, causal=causal, capacity_bytes=8 << 20, max_batch=3, max_queue=6, ends=[256]
    )

    def row_of(name: str | None) -> Any:
        return greedy(name, [5, 6], 9) if causal else Embedding(name, [5, 6])

    run(engine, [row_of(there)])
    reading = HeldReading(slow, monkeypatch)
    held = Held(engine)
    running = row_of(there)
    engine.submit([running])
    assert held.entered.wait(60)
    waiting = [row_of(slow) for _ in range(4)]  # more than a batch
    engine.submit(waiting)
    assert reading.entered.wait(60)
    held.go.set()  # running rows go on, and later rows overtake the waiting ones
    running.done.result(60)
    run(engine, [row_of(there), row_of(None)])
    assert engine.queued == 4 and not any(row.done.done() for row in waiting)
    with pytest.raises(QueueFullError):
        engine.submit([row_of(there) for _ in range(3)])
    waiting[1].cancelled = True
    run(engine, [row_of(there) for _ in range(3)])  # in its place
    assert waiting.pop(1).done.cancelled() and engine.queued == 3
    order: list[Row] = []
    for row in waiting:
        row.done.add_done_callback(lambda _, row=row: order.append(row))  # type: ignore[misc]
    reading.go.set()
    results = [row.done.result(60) for row in waiting]
    assert engine.close(60) and order == waiting and engine.pool.stats()["loads"] == 2
    reference = alone(model, root, slow)
    for row, result in zip(waiting, results, strict=True):
        if causal:
            assert row.drawn == continued(reference, [5, 6], 9)
        else:
            hidden = reference(torch.tensor([[5, 6]])).last_hidden_state[0].mean(0)
            assert torch.allclose(result, hidden / hidden.norm(), atol=1e-5)


def test_loads_that_fail_fail_their_rows_alone(
    causal_model: str,
    causal_adapters: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root, names = causal_adapters
    for name in ("damaged", "gone", "good"):
        replace(tmp_path / name, root / names[0], cut=-50 if name == "damaged" else None)
    lo.save_adapter(lo.adapt(fresh(causal_model), lo.LoRA(12)), tmp_path / "large")
    size = size_of(causal_model, tmp_path / "good")
    engine = Engine(lo.adapt(fresh(causal_model), None), tmp_path, causal=True, capacity_bytes=2 * size, ends=[256])
    reading = HeldReading("damaged", monkeypatch)
    running, *rows = (greedy(name, [5], 5) for name in (None, "damaged", "damaged", "large", "gone", "good", None))
    engine.submit([running, *rows])
    assert reading.entered.wait(60)
    shutil.rmtree(tmp_path / "gone")
    reading.go.set()
    failed = [type(row.done.exception(60)) for row in rows]
    assert failed == [AdapterError, AdapterError, AdapterError, UnknownAdapterError, type(None), type(None)]
    assert running.done.result(60) and rows[4].drawn == continued(alone(causal_model, root, names[0]), [5], 5)
    logged = [record.message.partition(":")[0] for record in caplog.records if record.name == "lowrank_ops"]
    assert logged == ["adapter 'damaged' cannot be loaded", "adapter 'large' cannot be loaded"]
    assert engine.close(60) and engine.queued == 0 and engine.pool.names() == ["good"]


def test_an_adapter_that_is_mended_while_it_is_read(
    causal_model: str, causal_adapters: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that arrives after the change does not get the error of the old files."""
    root, names = causal_adapters
    replace(tmp_path / "mine", root / names[0], cut=-50)
    engine = Engine(lo.adapt(fresh(causal_model), None), tmp_path, causal=True, capacity_bytes=8 << 20, ends=[256])
    reading = HeldReading("mine", monkeypatch)
    before, after = greedy("mine", [5], 5), greedy("mine", [5], 5)
    engine.submit([before])
    assert reading.entered.wait(60)
    replace(tmp_path / "mine", root / names[4])
    engine.submit([after])
    reading.go.set()
    after.done.result(60)
    assert after.drawn == before.drawn == continued(alone(causal_model, root, names[4]), [5], 5)
    assert engine.close(60) and engine.pool.stats()["loads"] == 1


@pytest.mark.parametrize("left", [False, True])
def test_closing_during_a_load(
    left: bool, small_model: str, encoder_adapters: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing finishes the rows that wait for a load, but does not wait for rows whose clients have left."""
    root, names = encoder_adapters
    engine = Engine(lo.adapt(fresh(small_model), None), root, causal=False, capacity_bytes=8 << 20)
    reading = HeldReading(names[1], monkeypatch)
    rows = [Embedding(name, [5, 6]) for name in (names[1], names[2], names[1])]
    engine.submit(rows)
    assert reading.entered.wait(60)
    if left:
        for row in rows:
            row.cancelled = True
        assert engine.close(60) and all(row.done.cancelled() for row in rows)
        reading.go.set()
    else:
        assert not engine.close(0) and not engine.alive
        with pytest.raises(ClosedError):
            engine.submit([Embedding(None, [5, 6])])
        reading.go.set()
        assert engine.close(60) and torch.equal(rows[0].done.result(0), rows[2].done.result(0))
        assert not torch.allclose(rows[0].done.result(0), rows[1].done.result(0), atol=1e-3)
    engine._reader.join(60)
    assert not engine._reader.is_alive()


@pytest.mark.parametrize("causal", [False, True])
def test_adapters_take_turns_where_one_has_room(
    causal: bool, small_model: str, causal_model: str, encoder_adapters: Any, causal_adapters: Any
) -> None:
    """Each adapter is read once though host memory holds nothing; no row joins before one that waits for room."""
    model, (root, names) = (causal_model, causal_adapters) if causal else (small_model, encoder_adapters)
    capacity = int(1.5 * size_of(model, root / names[0]))
    engine = Engine(
        lo.adapt(fresh(model), None), root, causal=causal, capacity_bytes=capacity, host_bytes=0, ends=[256]
    )  # fmt: skip
    held = Held(engine)
    rows = [greedy(names[n], [5], 9) if causal else Embedding(names[n], [5]) for n in (0, 4, 0, 4, 0, 4)]
    order: list[Row] = []
    for row in rows:
        row.done.add_done_callback(lambda _, row=row: order.append(row))  # type: ignore[misc]
    engine.submit(rows[:1])
    assert held.entered.wait(60)
    engine.submit(rows[1:])
    wait_for(lambda: names[4] in engine._arrived)
    held.go.set()
    results = [row.done.result(60) for row in rows]
    assert engine.close(60) and engine.pool.stats()["loads"] == 2
    assert order == [rows[n] for n in (0, 1, 3, 5, 2, 4)]
    for row, result in zip(rows, results, strict=True):
        reference = alone(model, root, row.adapter)
        if causal:
            assert row.drawn == continued(reference, [5], 9)  # type: ignore[attr-defined]
        else:
            hidden = reference(torch.tensor([[5]])).last_hidden_state[0].mean(0)
            assert torch.allclose(result, hidden / hidden.norm(), atol=1e-5)


def test_rows_that_run_let_none_join_past_one_without_room(
    causal_model: str, causal_adapters: tuple[Path, list[str]]
) -> None:
    root, names = causal_adapters
    capacity = int(1.5 * size_of(causal_model, root / names[0]))
    engine = Engine(lo.adapt(fresh(causal_model), None), root, causal=True, capacity_bytes=capacity, ends=[256])
    run(engine, [greedy(name, [5], 1) for name in (names[0], names[4])])  # one is in host memory then
    held = Held(engine)
    runs, waits, later = (greedy(names[n], [5], 9) for n in (0, 4, 0))
    engine.submit([runs])
    assert held.entered.wait(60)
    engine.submit([waits, later])
    joined: list[int] = []
    for row in (runs, waits):
        row.done.add_done_callback(lambda _: joined.extend(later.drawn))
    held.go.set()
    for row in (runs, waits, later):
        row.done.result(60)
        assert row.drawn == continued(alone(causal_model, root, row.adapter), [5], 9)
    assert engine.close(60) and joined == [] and engine.pool.stats()["loads"] == 2


def test_a_load_takes_no_room_from_those_that_run(causal_model: str, causal_adapters: tuple[Path, list[str]]) -> None:
    """Shared factors are not moved, so they could keep the running rows' adapter from returning to the arena."""
    root, names = causal_adapters
    lora, shared = names[:2]
    capacity = size_of(causal_model, root / lora)
    assert size_of(causal_model, root / shared) < capacity
    engine = Engine(lo.adapt(fresh(causal_model), None), root, causal=True, capacity_bytes=capacity, ends=[256])
    held = Held(engine)
    runs, waits, later = greedy(lora, [5], 9), greedy(shared, [5], 9), greedy(None, [5], 9)
    engine.submit([runs])
    assert held.entered.wait(60)
    engine.submit([waits])
    wait_for(lambda: shared in engine._arrived)
    held.entered.clear()
    held.pass_one()
    assert held.entered.wait(60)
    engine.submit([later])
    joined: list[int] = []
    runs.done.add_done_callback(lambda _: joined.extend([*waits.drawn, *later.drawn]))
    held.go.set()
    for row in (runs, waits, later):
        row.done.result(60)
        assert row.drawn == continued(alone(causal_model, root, row.adapter), [5], 9)
    assert engine.close(60) and joined == [] and engine.pool.stats()["loads"] == 2


def test_a_future_that_is_cancelled_fails_no_other(small_model: str) -> None:
    engine = Engine(lo.adapt(fresh(small_model), None), None, causal=False, capacity_bytes=1 << 20)
    held = Held(engine)
    first, *others = (Embedding(None, [5]) for _ in range(4))
    engine.submit([first])
    assert held.entered.wait(60)
    engine.submit(others)
    assert others[0].done.cancel()
    first.done.cancel()
    held.go.set()
    assert all(torch.equal(first.done.result(60), row.done.result(60)) for row in others[1:])
    assert engine.close(60)
