"""Run as a program: a Ray of two nodes on this machine, until its standard input ends. Prints its address.

Each node has a resource of its own, `left` or `right`. It takes its authentication from the environment.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    cluster = Cluster()
    try:
        for side in ("left", "right"):
            cluster.add_node(
                num_cpus=2,
                resources={side: 2},
                object_store_memory=80 * 1024 * 1024,
                include_dashboard=False,
            )
        sys.stdout.write(f"address {cluster.address}\n")
        sys.stdout.flush()
        sys.stdin.read()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
