"""The command `multitangent`.

Torch is loaded only when a command runs: `--help` must be quick.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from operator import or_
from typing import Annotated, Any

from multitangent_lab._errors import ConfigError, DataError


@dataclass(frozen=True)
class _Command:
    """One command.

    Args:
        config: The class of its configuration; the first line of its docstring is the help.
        presets: Configurations by name.
        run: Where its function is, as `module:name`.
    """

    config: type[Any]
    presets: Mapping[str, Any]
    run: str

    def __call__(self, config: Any, *, json: bool) -> dict[str, Any]:
        module, _, name = self.run.partition(":")
        function: Callable[..., dict[str, Any]] = getattr(import_module(module), name)
        return function(config, json=json)


def commands() -> dict[str, _Command]:
    """Returns the commands by name."""
    from multitangent_lab.config import (
        COMPARE_PRESETS,
        DOCTOR_PRESETS,
        TRAIN_PRESETS,
        BenchConfig,
        CompareConfig,
        DoctorConfig,
        FuzzConfig,
        ReproduceConfig,
        SearchConfig,
        SuggestConfig,
        TrainConfig,
    )

    home = "multitangent_lab.cli._commands"
    return {
        "train": _Command(TrainConfig, TRAIN_PRESETS, f"{home}:run_train"),
        "compare": _Command(CompareConfig, COMPARE_PRESETS, f"{home}:run_compare"),
        "reproduce": _Command(ReproduceConfig, {}, "multitangent_lab.experiments:run_reproduce"),
        "lr-search": _Command(SearchConfig, {}, "multitangent_lab.search:run_search"),
        "lr-suggest": _Command(SuggestConfig, {}, "multitangent_lab.search:run_suggest"),
        "bench": _Command(BenchConfig, {}, "multitangent_lab.benchmarks:run_bench"),
        "doctor": _Command(DoctorConfig, DOCTOR_PRESETS, "multitangent_lab.checkup:run_doctor"),
        "fuzz": _Command(FuzzConfig, {}, "multitangent_lab.fuzz:run_fuzz"),
    }


def parse(arguments: Sequence[str]) -> tuple[_Command, Any]:
    """Returns the command that `arguments` name, and its `Options`.

    Raises:
        ConfigError: A value, a preset or the configuration file is not as it should be.
        SystemExit: Help was asked for (code 0), or an option is unknown (code 2).
    """
    import tyro

    from multitangent_lab.cli._options import Options, starting_point

    commands_by_name = commands()
    types = []
    for name, command in commands_by_name.items():
        defaults = command.config()
        if arguments[:1] == [name]:
            defaults = starting_point(defaults, command.presets, arguments[1:])
        types.append(
            Annotated[
                Options[command.config],  # type: ignore[name-defined]
                tyro.conf.subcommand(
                    name,
                    default=Options(defaults),
                    description=(command.config.__doc__ or "").partition("\n")[0],
                ),
            ]
        )
    choice: Any = reduce(or_, types)
    options = tyro.cli(
        choice,
        prog="multitangent",
        description="Train without a backward pass: multi-tangent forward gradients.",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    (command,) = (c for c in commands_by_name.values() if type(options.settings) is c.config)
    return command, options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: By default those of the process.

    Returns:
        0; 1 for a run that failed, a fuzz that found something wrong, or a model that does
        not fit; 2 for bad input. Errors
        are one line on standard error, or a traceback where `$MULTITANGENT_TRACEBACK` is set.
    """
    try:
        command, options = parse(sys.argv[1:] if arguments is None else list(arguments))
        value = command(options.settings, json=options.json)
        if options.json:
            print(json.dumps(value))
    except KeyboardInterrupt:
        print(
            "multitangent: interrupted. Try the same command again, for train with --resume.",
            file=sys.stderr,
        )
        return 130
    except Exception as error:
        if os.environ.get("MULTITANGENT_TRACEBACK"):
            raise
        hint = _HINT if isinstance(error, ModuleNotFoundError) else ""
        text = " ".join([str(error), *getattr(error, "__notes__", ())])
        print("multitangent:", " ".join(text.split()) + hint, file=sys.stderr)
        return 2 if _is_bad_input(error) else 1
    return int(value.get("failed", False))


_HINT = ". Try: pip install 'multitangent[lab]', which brings what the commands need."


def _is_bad_input(error: Exception) -> bool:
    return isinstance(error, ConfigError | DataError | ImportError)
