"""The command `diphase`. Errors are one sentence on stderr; exit status 2 for what the user can change,
else 1."""

from __future__ import annotations

import argparse
import asyncio
import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from ..proto.clock import system_rng
from ..proto.errors import CheckpointError, ConfigError, DiphaseError, InvalidRequest, NotFound
from ..proto.rpc import host_port
from . import generate, profile_command, scale, status, trace, validate_command
from .config import GIVEN, ClusterConfig, load
from .config_writer import to_toml
from .endpoint import WILDCARDS
from .load import command as bench
from .planner import plan_command

DEMO_SETTINGS = (
    "gateway.port=0",
    # The demonstration's prompts are short, and it is of the hand-off.
    "router.local_prefill_tokens=0",
)

COMMANDS = (
    "serve", "generate", "status", "trace", "scale", "restart", "bench", "plan", "profile", "validate",
    "config", "demo",
)  # fmt: skip

REACHING = ("gateway.host", "gateway.port", "security.cluster_token")
"""All that the commands which talk to a running cluster read of a configuration."""

_USER_CAN_CHANGE = (ConfigError, CheckpointError, InvalidRequest, NotFound)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status."""
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    if unknown:
        args.parser.refuse(args, unknown)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger(__name__.partition(".")[0]).setLevel(logging.DEBUG if args.verbose else logging.WARNING)
    try:
        _check_text(args)
        return _run(args)
    except DiphaseError as exc:
        sys.stderr.write(f"diphase {args.command}: {exc.message}\n")
        return 2 if isinstance(exc, _USER_CAN_CHANGE) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever reads the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class _Parser(argparse.ArgumentParser):
    """Answers a mistake with its own usage and the nearest thing that it knows."""

    def error(self, message: str) -> NoReturn:
        """As argparse, but for an unknown command."""
        wrong = re.match(r"argument COMMAND: invalid choice: '(.*?)'", message)
        super().error(f"unknown command {wrong[1]}{_instead(wrong[1], COMMANDS)}" if wrong else message)

    def refuse(self, args: argparse.Namespace, words: Sequence[str]) -> NoReturn:
        """Ends the program over `words`, which are left over when `args` took theirs."""
        options = [word.partition("=")[0] for word in words if word.startswith("-")]
        if options:
            self.error(f"unknown option {options[0]}{_instead(options[0], self._option_string_actions)}")
        if "prompt" in args:
            prompt = " ".join([args.prompt, *words])
            self.error(f'the prompt is one argument; quote it: diphase {args.command} "{prompt}"')
        self.error(f"{args.command} takes options only, not {' '.join(words)}")


def _instead(wrong: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(wrong, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"


def _parser() -> _Parser:
    parser = _Parser(prog="diphase", description=__doc__)
    parser.add_argument("--version", action="version", version=f"diphase {version('diphase')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(parser=made)
        made.add_argument("-v", "--verbose", action="store_true", help="log to stderr")
        return made

    def add(name: str, text: str, sets: str = "section.key=value") -> argparse.ArgumentParser:
        made = command(name, text)
        made.add_argument("--config", type=Path, metavar="FILE", help="TOML file; see `diphase config`")
        made.add_argument("--set", action="append", default=[], metavar="K=V", dest="settings", help=sets)
        return made

    def ask(name: str, text: str) -> argparse.ArgumentParser:
        return add(name, text, f"how to reach the gateway: {', '.join(REACHING)}")

    add("serve", "start a cluster and serve until Ctrl-C")
    generate.add_arguments(ask("generate", "send one prompt and stream the answer"))
    status.add_arguments(ask("status", "show pools, load, KV use and hand-offs in flight"))
    trace.add_arguments(ask("trace", "show one request's way through gateway and workers"))
    scale.add_scale_arguments(ask("scale", "give a pool another number of workers while it serves"))
    scale.add_restart_arguments(ask("restart", "replace workers one after the other while they serve"))
    bench.add_arguments(ask("bench", "measure latency, attainment and goodput under load"))
    plan_command.add_arguments(command("plan", "find the placement that serves a workload best, and say why"))
    profile_command.add_arguments(add("profile", "measure this machine's engine for the planner"))
    validate_command.add_arguments(add("validate", "serve a workload and simulate it, and compare"))
    add("config", "print the resolved configuration, with what every key means")
    add("demo", "start a cluster, send it three prompts, print answers and timings, stop")
    return parser


def _run(args: argparse.Namespace) -> int:
    if args.command in _HERE:
        return _HERE[args.command](args)
    if args.command not in ("serve", "config", "demo"):
        _check_settings(args)
    settings = [*DEMO_SETTINGS, *args.settings] if args.command == "demo" else args.settings
    config = load(args.config, settings, system_rng())
    if args.command == "config":
        sys.stdout.write(to_toml(config, hidden=GIVEN))
        return 0
    if args.command in ("serve", "demo"):
        return _run_cluster(args.command, config)
    return _ask(args, config)


_HERE = {"plan": plan_command.run, "profile": profile_command.run, "validate": validate_command.run}
"""Commands that talk to no running cluster, and read what they need of the configuration themselves."""


def _check_settings(args: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: a `--set` of a command that talks to a running cluster would change nothing.
    """
    for setting in args.settings:
        if setting.partition("=")[0].strip() in REACHING:
            continue
        instead = (
            f"--with {setting} gives it to the new workers"
            if args.command == "restart"
            else "others are for `diphase serve`, and for workers that run `diphase restart --with`"
        )
        raise ConfigError(
            f"--set {setting} would change nothing: {args.command} reads {', '.join(REACHING)} only; "
            f"{instead}"
        )


def _check_text(args: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: an argument is no text; paths may be any bytes.
    """
    for name, value in vars(args).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.isascii() and _is_no_text(text):
                raise ConfigError(f"{name.upper()} {text!a} is not UTF-8; write it in a UTF-8 terminal")


def _is_no_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _run_cluster(command: str, config: ClusterConfig) -> int:
    # Imported here: Ray costs a quarter of a second that the other commands need not pay.
    from .demo import demo
    from .serve import serve

    return asyncio.run((serve if command == "serve" else demo)(config, Console(highlight=False)))


def _ask(args: argparse.Namespace, config: ClusterConfig) -> int:
    """The commands that talk to a running cluster."""
    host = "127.0.0.1" if config.gateway.host in WILDCARDS else config.gateway.host
    address = args.address or host_port(host, config.gateway.port)
    commands: dict[str, Callable[[argparse.Namespace, str, str], int]] = {
        "generate": generate.run,
        "status": status.run,
        "trace": trace.run,
        "scale": scale.run_scale,
        "restart": scale.run_restart,
        "bench": bench.run,
    }
    # Unless it was configured the token is a drawn one, which only a gateway on loopback overlooks.
    return commands[args.command](args, address, config.security.cluster_token)
