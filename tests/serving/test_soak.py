"""Clients that ask, stream, leave and cancel while adapters are replaced: answers are right, memory and threads level.

Six seconds by default; LOWRANK_OPS_SOAK_SECONDS sets another time (``make soak``: ten minutes).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from serving_helpers import alone, continued, process, replace, text_of, tokenizer_of

httpx = pytest.importorskip("httpx")
SECONDS = float(os.environ.get("LOWRANK_OPS_SOAK_SECONDS", "6"))


def usage_of(pid: int) -> tuple[float, int]:
    """Resident memory in MB, and the number of threads."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) / 1024, int(lines["Threads"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_soak(causal_model: str, causal_adapters: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, names = causal_adapters
    served, base, tokenizer = tmp_path / "adapters", Path(causal_model).name, tokenizer_of(causal_model)
    for name in names[:5]:
        shutil.copytree(root / name, served / name)
    # Both versions are of one kind, so that only the tensors are replaced, in one step.
    versions = [root / names[0], root / names[4]]
    shutil.copytree(versions[0], served / "hot")
    prompts = [text_of(n)[:40] for n in range(6)]
    expected: dict[tuple[str, str], set[str]] = {}
    for name in [base, *names[:5]]:
        model = alone(causal_model, root, None if name == base else name)
        for prompt in prompts:
            drawn = continued(model, tokenizer(prompt)["input_ids"], 12)
            expected[name, prompt] = {tokenizer.decode(drawn, skip_special_tokens=True)}
    for prompt in prompts:
        expected["hot", prompt] = expected[names[0], prompt] | expected[names[4], prompt]
    assert len(set().union(*expected.values())) > 25  # a swapped adapter would show
    counts: Counter[str] = Counter()
    wrong: list[Any] = []
    usage: list[tuple[float, float, int]] = []
    until = 0.0  # set once the server runs

    async def one(c: Any, chance: random.Random) -> None:
        name, prompt = chance.choice(list(expected))
        body = {"model": name, "prompt": prompt, "max_tokens": 12, "temperature": 0}
        how = chance.choice(["ask", "ask", "stream", "leave", "cancel", "refused"])
        if how == "ask":
            answer = await c.post("/v1/completions", json=body)
            text = answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.text
        elif how in ("stream", "leave"):
            text = ""
            async with c.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        text += json.loads(line[6:])["choices"][0]["text"]
                        if how == "leave" and chance.random() < 0.3:
                            break
        elif how == "cancel":
            with suppress(TimeoutError):
                await asyncio.wait_for(c.post("/v1/completions", json=body), chance.random() * 0.05)
        else:
            answer = await c.post(
                "/v1/completions", json=body | {"model": "nobody", "prompt": "a" * chance.choice([1, 5000])}
            )
            if answer.status_code not in (400, 404):
                wrong.append(answer.text)
        if how in ("ask", "stream") and text not in expected[name, prompt]:
            wrong.append((name, prompt, text))
        if how == "leave" and not any(right.startswith(text) for right in expected[name, prompt]):
            wrong.append((name, prompt, text))
        counts[how] += 1

    async def client(c: Any, number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < until and not wrong:
            await one(c, chance)

    async def swap() -> None:
        while time.monotonic() < until:
            await asyncio.to_thread(replace, served / "hot", versions[counts["swap"] % 2])
            counts["swap"] += 1
            await asyncio.sleep(0.1)

    async def watch(pid: int) -> None:
        while time.monotonic() < until:
            usage.append((time.monotonic(), *usage_of(pid)))
            await asyncio.sleep(SECONDS / 60)

    async def all_of_them(url: str, pid: int) -> int:
        async with httpx.AsyncClient(base_url=url, timeout=120) as c:
            await asyncio.gather(swap(), watch(pid), *(client(c, n) for n in range(8)))
            for _ in range(100):
                shown = (await c.get("/metrics")).text
                if "lowrank_ops_queue_rows 0.0" in shown and "lowrank_ops_requests_running 0.0" in shown:
                    break
                await asyncio.sleep(0.1)
            else:
                pytest.fail("rows of clients that left stay: " + shown)
            return int((await c.get("/health")).status_code)

    with process(causal_model, "--adapters", served, "--max-batch", 8) as (url, started):
        until = time.monotonic() + SECONDS
        assert asyncio.run(all_of_them(url, started.pid)) == 200
    assert not wrong, wrong[:3]
    third = len(usage) // 3
    early, late = usage[third : 2 * third], usage[2 * third :]
    memory = [max(m for _, m, _ in part) for part in (early, late)]
    threads = [max(t for *_, t in part) for part in (early, late)]
    print(f"\n{dict(counts)}; MB {memory}, threads {threads} in the second and the last third")
    assert memory[1] < memory[0] * 1.05 + 10
    assert threads[1] <= threads[0] + 2
