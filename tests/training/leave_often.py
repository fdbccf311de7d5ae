"""Pairs of processes that join, agree and leave, one pair after the other: `python leave_often.py PAIRS`.

Prints the exit codes of each pair; one that waits for ever has None after a minute.
"""

import multiprocessing
import os
import socket
import sys

import torch

from chimera_cli.training.distributed import joined


def leave(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(place)
    with joined(torch.device("cpu")) as processes:
        for _ in range(5):
            processes.agree(True)


def main() -> None:
    # Forked, so that torch is loaded once and not by every process.
    context = multiprocessing.get_context("fork")
    for _ in range(int(sys.argv[1])):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pair = [context.Process(target=leave, args=(rank, port)) for rank in range(2)]
        for process in pair:
            process.start()
        for process in pair:
            process.join(timeout=60)
        sys.stdout.write(f"{pair[0].exitcode} {pair[1].exitcode}\n")
        for process in pair:
            process.kill()


if __name__ == "__main__":
    main()
