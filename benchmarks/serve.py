"""Load on the search page: many clients for a minute, a tenth of them malformed or silent.

python benchmarks/serve.py --index=runs/index --image=photo.jpg --clients=200 --seconds=60

Starts `tcq serve`, sends searches and prints answers by status, latencies, memory and threads of the server.
`--search=/search` is the path of versions before the JSON API.
"""

import argparse
import asyncio
import collections
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

FAULTS = ("silent", "half a header", "half a body", "no HTTP", "no image", "wrong host")


def main() -> None:
    """Runs the load and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--index", required=True)
    parser.add_argument("--image", required=True)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--search", default="/api/search")
    parser.add_argument("--python", default=sys.executable)
    a = parser.parse_args()
    command = [a.python, "-m", "tcq", "serve", f"--index={a.index}", f"--port={a.port}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            while "search page at" not in server.stderr.readline():
                assert server.poll() is None
            asyncio.run(_load(a, psutil.Process(server.pid)))
        finally:
            server.terminate()
            server.stderr.close()


async def _load(a: argparse.Namespace, process: psutil.Process) -> None:
    body = Path(a.image).read_bytes()
    await asyncio.gather(*(_search(a, body) for _ in range(16)))  # programs are compiled
    state = [(process.memory_info().rss, process.num_threads())]
    results: collections.Counter[str] = collections.Counter()
    latencies: list[float] = []
    end = time.monotonic() + a.seconds

    async def client(number: int) -> None:
        while time.monotonic() < end:
            start = time.monotonic()
            if number % 10 == 0:
                fault = FAULTS[number // 10 % len(FAULTS)]
                results[f"{fault}: {await _fault(a, body, fault)}"] += 1
                continue
            status = await _search(a, body)
            results[status] += 1
            if status == "200":
                latencies.append(time.monotonic() - start)
            else:
                await asyncio.sleep(1)  # as Retry-After says

    async def watch() -> None:
        for _ in range(4):
            await asyncio.sleep(a.seconds / 4)
            state.append((process.memory_info().rss, process.num_threads()))

    await asyncio.gather(watch(), *(client(number) for number in range(a.clients)))
    alive = await _search(a, body)
    for name, count in sorted(results.items()):
        print(f"{name:<40} {count:>8,}")
    cuts = statistics.quantiles(latencies, n=100)
    print(f"answers/s {len(latencies) / a.seconds:.0f}; p50 {cuts[49] * 1000:.0f} ms, p99 {cuts[98] * 1000:.0f} ms")
    print(f"MiB at the start and each quarter: {', '.join(f'{rss / 2**20:.0f}' for rss, _ in state)}")
    print(f"threads: {', '.join(str(threads) for _, threads in state)}")
    print(f"a search afterwards: {alive}")


async def _search(a: argparse.Namespace, body: bytes) -> str:
    return await _exchange(a, _request(a, body) + body)


def _request(a: argparse.Namespace, body: bytes, host: str = "") -> bytes:
    lines = (
        f"POST {a.search} HTTP/1.1",
        f"Host: {host or f'127.0.0.1:{a.port}'}",
        f"Content-Length: {len(body)}",
        "Connection: close",
    )
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def _fault(a: argparse.Namespace, body: bytes, fault: str) -> str:
    request = _request(a, body)
    sent = {
        "silent": b"",
        "half a header": request[: len(request) // 2],
        "half a body": request + body[: len(body) // 2],
        "no HTTP": bytes(range(256)) * 4,
        "no image": _request(a, b"hello") + b"hello",
        "wrong host": _request(a, body, "attacker.example") + body,
    }[fault]
    return await _exchange(a, sent, patience=15)


async def _exchange(a: argparse.Namespace, sent: bytes, *, patience: float = 120) -> str:
    """The status of an answer, or what happened instead."""
    writer = None
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", a.port)
        writer.write(sent)
        await writer.drain()
        answer = await asyncio.wait_for(reader.read(), patience)
        return answer[9:12].decode() if answer.startswith(b"HTTP/1") else "closed"
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return type(error).__name__
    finally:
        if writer is not None:
            writer.close()


if __name__ == "__main__":
    main()
