"""What all verbs of the command line share: registration, exit codes, progress, printing. Data on stdout, all else on stderr."""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape

from graphprune.errors import GraphPruneError

DEBUG = "GRAPHPRUNE_DEBUG"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Makes trained networks smaller and faster, and proves that the cut is right.\n\n"
    "IN is an [bold].onnx[/] file, or a folder with a Hugging Face checkpoint.\n\n"
    "Start with [bold]graphprune prune in.onnx -o out.onnx --ratio 0.3[/]",
    epilog="Exit codes: 0 done, 2 wrong use or input, 3 nothing to prune, 4 budget not met, 5 verification failed, 130 interrupted.",
)

@dataclass(frozen=True)
class Talk:
    """How much is said, and in which form."""

    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress, no warnings; results and errors only.")] = False
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False


def verb(name: str, example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function as a verb of the command line.

    Parameters that are dataclasses of options become options of the verb. What is raised becomes one line on stderr and an exit code.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        bundles: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
        parameters = []
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name not in bundles:
                parameters.append(parameter.replace(annotation=hints[parameter.name], kind=parameter.KEYWORD_ONLY))
                continue
            inner = get_type_hints(bundles[parameter.name], include_extras=True)
            for field in fields(bundles[parameter.name]):
                option = inspect.Parameter(field.name, parameter.KEYWORD_ONLY, default=field.default, annotation=inner[field.name])
                parameters.append(option)

        def run(**given: Any) -> None:
            for bundle, cls in bundles.items():
                given[bundle] = cls(**{field.name: given.pop(field.name) for field in fields(cls)})
            raise typer.Exit(_guarded(lambda: function(**given)))

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        return app.command(name, epilog=f"Example: [bold]{escape(example)}[/]")(run)

    return register


def _guarded(call: Callable[[], None]) -> int:
    """The exit code of `call`: never a traceback, unless it is asked for."""
    if os.environ.get(DEBUG):
        call()
        return 0
    try:
        call()
        return 0
    except GraphPruneError as error:
        code, line = error.exit_code, str(error)
    except KeyboardInterrupt:
        code, line = 130, "interrupted; nothing was written"
    except BrokenPipeError:  # the reader of stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        code, line = 2, f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    except MemoryError:
        code, line = 1, "out of memory"
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        code, line = 1, f"internal error, {type(error).__name__}: {first} (set {DEBUG}=1 to see where, and please report it)"
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {escape(line)}")
    return code


class _Progress(logging.Handler):
    """Shows the library's messages: what is going on as a changing line on a terminal, warnings as lines that stay."""

    def __init__(self, console: Console, status: Any) -> None:
        super().__init__(logging.INFO)
        self.console, self.status = console, status

    def emit(self, record: logging.LogRecord) -> None:
        line = escape(record.getMessage())
        if record.levelno >= logging.WARNING:
            self.console.print(f"[yellow]warning:[/] {line}", soft_wrap=True, highlight=False)
        elif self.status is not None:
            self.status.update(line)


@contextmanager
def progress(talk: Talk, doing: str) -> Iterator[None]:
    """While the block runs: progress and warnings on stderr, unless `--quiet`; the noise of other libraries kept away."""
    log, console = logging.getLogger("graphprune"), Console(stderr=True)
    if not os.environ.get(DEBUG):
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    status = console.status(escape(doing)) if console.is_terminal and not talk.quiet else None
    handler = _Progress(console, status) if not talk.quiet else logging.NullHandler()
    before, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        if status is None:
            yield
        else:
            with status:
                yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
        log.propagate = propagate


def show(talk: Talk, data: Callable[[], Any], view: Callable[[], Any]) -> None:
    """Print `data` as JSON or `view` as text."""
    if talk.json:
        value = data()
        print(value if isinstance(value, str) else json.dumps(value, indent=2, default=str))
    else:
        Console(highlight=False).print(view())
