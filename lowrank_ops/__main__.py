"""The command line: python -m lowrank_ops, or lowrank-ops."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lowrank-ops", description="Frozen 4-bit linear layers with low-rank adapters, on CPU and GPU."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    from .bench import suite
    from .commands import combine, convert, demo, evaluate, extract, info, precompute, quantize, reward, serve
    from .commands.scaling import run as scaling
    from .commands.wide_options import complete

    info_parser = commands.add_parser("info", help="show what this installation has and lacks")
    info_parser.add_argument("--json", action="store_true", help="print JSON")
    combine_parser = commands.add_parser("combine", help="make one adapter of several, from their files alone")
    combine.add_arguments(combine_parser)
    convert_parser = commands.add_parser("convert", help="write an adapter for PEFT, diffusers or llama.cpp")
    convert.add_arguments(convert_parser)
    demo_parser = commands.add_parser("demo", help="fine-tune a 4-bit MiniLM to find a function by its docstring")
    demo.add_arguments(demo_parser)
    evaluate_parser = commands.add_parser("evaluate", help="compare models with the first one: perplexity, KL, bits")
    evaluate.add_arguments(evaluate_parser)
    extract_parser = commands.add_parser("extract", help="make an adapter of what training changed in a checkpoint")
    extract.add_arguments(extract_parser)
    precompute_parser = commands.add_parser(
        "precompute", help="compute the singular vectors of a checkpoint's layers once"
    )
    precompute.add_arguments(precompute_parser)
    quantize_parser = commands.add_parser(
        "quantize", help="write a model in 4 bits, file by file, also for bitsandbytes"
    )
    quantize.add_arguments(quantize_parser)
    scaling_parser = commands.add_parser("scaling", help="fit scaling laws to runs and divide a budget by them")
    scaling.add_arguments(scaling_parser)
    serve_parser = commands.add_parser("serve", help="serve a model and its adapters over HTTP, in OpenAI's format")
    serve.add_arguments(serve_parser)

    bench_parser = commands.add_parser("bench", help="compare time and memory with bitsandbytes, PEFT and torch")
    suite.add_arguments(bench_parser)
    reward_parser = commands.add_parser("reward", help="train a 4-bit reward model on pairs of answers")
    reward.add_arguments(reward_parser)

    arguments = parser.parse_args(complete(sys.argv[1:] if argv is None else argv))
    if arguments.command == "info":
        print(json.dumps(info.collect(), indent=2) if arguments.json else info.text())
        return 0
    commands_run = {
        "bench": suite.run,
        "combine": combine.run,
        "convert": convert.run,
        "demo": demo.run,
        "evaluate": evaluate.run,
        "extract": extract.run,
        "precompute": precompute.run,
        "quantize": quantize.run,
        "reward": reward.run,
        "scaling": scaling.run,
        "serve": serve.run,
    }
    return commands_run[arguments.command](arguments)


if __name__ == "__main__":
    sys.exit(main())
