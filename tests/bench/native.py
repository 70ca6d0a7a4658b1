"""A load by native gRPC: a bounded number of calls at a time, over one channel.

    python -m tests.bench.native ADDRESS TOKENS SECONDS CALLS

The answers are taken as bytes: reading them is the client's own affair.
"""

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import grpc
import uvloop

Method = grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
METHOD = "/controlplane.api.v1.DatabaseService/ListDatabases"


async def main(address: str, tokens: list[str], seconds: float, calls: int) -> None:
    """Call for a while, and print what came of it as one line of JSON."""
    took: list[float] = []
    async with grpc.aio.insecure_channel(address) as channel:
        began = time.perf_counter()
        turn = cycle([(("authorization", f"Bearer {token}"),) for token in tokens])
        broken = sum(await asyncio.gather(*(_caller(channel, turn, began + seconds, took) for _ in range(calls))))
        lasted = time.perf_counter() - began
    took.sort()
    sys.stdout.write(
        json.dumps(
            {
                "requests": len(took),
                "seconds": lasted,
                "refused": broken,
                "broken": 0,
                "p50_ms": took[len(took) // 2] * 1000 if took else 0,
                "p99_ms": took[len(took) * 99 // 100] * 1000 if took else 0,
            }
        )
        + "\n"
    )


async def _caller(
    channel: grpc.aio.Channel, turn: Iterator[tuple[tuple[str, str]]], until: float, took: list[float]
) -> int:
    """Call again and again; return how many calls have failed."""
    method: Method = channel.unary_unary(METHOD)
    broken = 0
    while (began := time.perf_counter()) < until:
        try:
            await method(b"", metadata=next(turn))
        except grpc.aio.AioRpcError:
            broken += 1
        else:
            took.append(time.perf_counter() - began)
    return broken


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], Path(sys.argv[2]).read_text().split(), float(sys.argv[3]), int(sys.argv[4])))
