"""A process with vLLM for bench_serve, which starts it with the Python of vLLM's environment: MODEL_DIR THREADS.

Each line of stdin is JSON, [prompts, drawn]: tokens of prompts, and how many tokens each of them gets. The answer is a line
on stdout: the seconds of processor time. Needs no package but vLLM.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    model, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's messages
    os.environ |= {
        "OMP_NUM_THREADS": threads, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    import vllm

    options: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 1024, "max_num_seqs": 8, "enforce_eager": True}
    engine = vllm.LLM(model, **options, enable_prefix_caching=False, disable_log_stats=True)
    for line in sys.stdin:
        prompts, drawn = json.loads(line)
        began = time.process_time()
        asked = vllm.SamplingParams(max_tokens=drawn, temperature=0, ignore_eos=True)
        made = engine.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
        assert all(len(answer.outputs[0].token_ids) == drawn for answer in made)
        print(time.process_time() - began, file=answers, flush=True)


if __name__ == "__main__":
    main()
