"""`python3 -m hack.cluster choose | up | load-image IMAGE... | down [--purge]`: hack/README.md."""

import argparse
import json
import os
import subprocess
import sys

from hack import engines
from hack.cluster import Cluster, ClusterError, choose, leftovers, memory
from hack.host import MissingPackages
from hack.progress import say


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hack.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("choose", help="which cluster would be used, and why")
    commands.add_parser("up", help="make or start it; how to reach it goes to stdout as JSON")
    load = commands.add_parser("load-image", help="give it images that hack.images built")
    load.add_argument("images", nargs="+", metavar="IMAGE")
    down = commands.add_parser("down", help="end what `up` or the demo brought up")
    down.add_argument("--purge", action="store_true", help="forget its state and our images too")
    down.add_argument("--caches", action="store_true", help="with --purge: build caches as well")
    return parser.parse_args(words)


def run(given: argparse.Namespace, cluster: Cluster) -> None:
    tell(cluster)
    match given.command:
        case "choose":
            kind = type(cluster).__name__.lower()
            print(json.dumps({"kind": kind, "reason": cluster.reason}))
        case "up":
            print(json.dumps(memory.up(cluster).as_json(), indent=2))
        case "load-image":
            cluster.load(given.images)


def down(purge: bool, caches: bool) -> None:
    """Ends every cluster that was used, also where another fails. Raises ClusterError."""
    problems = []
    for cluster in memory.used(os.environ):
        tell(cluster)
        try:
            cluster.down(purge)
        except (ClusterError, subprocess.CalledProcessError, OSError) as error:
            problems.append(str(error))
            continue
        if purge:
            memory.forget(cluster)
    if problems:
        raise ClusterError("; ".join([*problems, *memory.hint()]))
    if purge:
        leftovers.remove_images()
        leftovers.remove_or_name_caches(caches)


def tell(cluster: Cluster) -> None:
    say(f"cluster: {type(cluster).__name__.lower()}, because {cluster.reason}")


def main() -> None:
    given = arguments()
    try:
        if given.command == "down":
            down(given.purge, given.caches)
        else:
            run(given, choose())
    except subprocess.CalledProcessError as error:
        sys.exit(f"hack.cluster: {' '.join(map(str, error.cmd))[:300]} failed")
    except (ClusterError, engines.NoEngine, MissingPackages, OSError) as error:
        sys.exit(f"hack.cluster: {error}")


if __name__ == "__main__":
    main()
