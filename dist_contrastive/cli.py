"""What the entry points share: a command line from a dataclass, and one clear line for a user's mistake.

def main(argv: Sequence[str] | None = None) -> None:
    config = parse(PackConfig, argv, prog="python -m dist_contrastive.pack", about=__doc__)
    ...

if __name__ == "__main__":
    sys.exit(main_guard(main))
"""

import contextlib
import difflib
import inspect
import io
import itertools
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, NoReturn, TypeVar, overload

import tyro

from dist_contrastive.config import UserError, with_user_paths

T = TypeVar("T")

# What a shell reports for a program that Ctrl-C ended (128 + SIGINT).
EXIT_INTERRUPTED = 130
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: the same command goes on from where this one stopped
MAX_LISTED = 5
"""Options of a section that are listed where none is close to what was given."""


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """` (did you mean X?)` for the entry of `known` closest to `name`, or an empty string where none is close.

    `cutoff` is how close, in [0, 1], as `difflib` counts.
    """
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {matches[0]}?)" if matches else ""


@overload
def parse(
    cls_or_default: type[T], argv: Sequence[str] | None = None, prog: str | None = None, about: str | None = None
) -> T: ...
@overload
def parse(
    cls_or_default: T, argv: Sequence[str] | None = None, prog: str | None = None, about: str | None = None
) -> T: ...
def parse(
    cls_or_default: Any, argv: Sequence[str] | None = None, prog: str | None = None, about: str | None = None
) -> Any:
    """Build a dataclass from the command line.

    `cls_or_default` is a dataclass, or an instance whose values are the defaults; with an instance, a field that holds
    a subclass of its annotation (`TrainConfig(method=SimCLRConfig())`) gets the subclass's options. `argv` are the
    arguments without the program's name (None: the process's own); `prog` is what usage lines call the program, and
    `about` is what its help page says first: an entry point's docstring. In every path a leading `~` becomes the home folder.

    Raises `UserError` with one line where tyro prints a box: an unknown option (with the nearest name), a value of the
    wrong type, a missing value, and whatever the dataclass's own validation refuses. `--help` prints and exits with 0.

    A tuple of dataclasses in an instance has options by number (`--augment.1.blur`); without a number (`--augment.blur`) they
    hold for each of them.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if isinstance(cls_or_default, type):
        cls, options = cls_or_default, {}
    else:
        cls, options = type(cls_or_default), {"default": cls_or_default}
        args = _for_all(args, _numbered_options(cls_or_default))

    def run(arguments: list[str]) -> Any:
        # What is fixed is no option; it stays known to the parser, which tells who tries it what it is fixed to.
        hidden = (tyro.conf.SuppressFixed,) if _asks_for_help(arguments) else ()
        return tyro.cli(
            cls,
            args=arguments,
            prog=prog,
            description="" if about else None,
            return_unknown_args=True,
            config=(tyro.conf.PositionalMetavarFromFieldName, *hidden),
            registry=_REGISTRY,
            **options,
        )

    errors = io.StringIO()
    try:
        with page() if _asks_for_help(args) else contextlib.nullcontext():
            if about and _asks_for_help(args):
                print(_reflow(about), end="\n\n")
            with contextlib.redirect_stderr(errors):
                config, unknown = run(args)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise UserError(_one_line(stop, errors.getvalue(), prog)) from None
    if unknown:
        # A value given to an unknown option is listed as unknown as well; the option is what was mistyped.
        name = next((token for token in unknown if token.startswith("-")), unknown[0])
        if not name.startswith("-"):
            raise UserError(f"unexpected argument {name!r}; {_help_hint(prog)}")
        flag = name.partition("=")[0]
        known = _known_flags(run)
        # The section is mostly right: --batch.size means one of --batch's, not --data.image-size.
        section = [option for option in known if option.startswith(flag.rpartition(".")[0] + ".")]
        hint = nearest(flag, section, cutoff=0.8)
        if not hint:
            hint = f" (there are {', '.join(section)})" if 0 < len(section) <= MAX_LISTED else nearest(flag, known)
        raise UserError(f"unknown option {flag}{hint}; {_help_hint(prog)}")
    return with_user_paths(config)


def main_guard(function: Callable[[], object]) -> int:
    """Run an entry point; the exit status of the process.

    A `UserError` becomes `error: <one line>` on stderr and status 2, Ctrl-C one line and status 130. Anything else is
    an internal fault and keeps its traceback.
    """
    try:
        function()
    except UserError as error:
        tell_mistake(str(error))
        return EXIT_USER_ERROR
    except KeyboardInterrupt as error:
        print(f"error: interrupted {error}".rstrip(), file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    return 0


def tell_mistake(text: str) -> None:
    """The one line about a user's mistake; once a host, as all ranks of a run stop at the same one."""
    if speaks_for_host():
        print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)


def exit_at_once(status: int) -> NoReturn:
    """End the process from any thread, without what libraries do at exit, which may wait for other ranks."""
    signal.alarm(5)  # should nobody read what is flushed
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


@contextlib.contextmanager
def page() -> Iterator[None]:
    """What is printed within the context is there to be read: once a host, and as far as the reader wants (head, less)."""
    if not speaks_for_host():
        with contextlib.redirect_stdout(io.StringIO()):
            yield
        return
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit()


def speaks_for_host() -> bool:
    """Whether this process is the one rank of its host that tells people what all ranks would say."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.struct_rule
def _numbered(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
    """A tuple of dataclasses: options by number, where there are several, each section with the dataclass's own sentence."""
    if not _is_numbered(info.default):
        return None
    kind, several = type(info.default[0]), len(info.default) > 1
    (about, *_) = (inspect.getdoc(kind) or "").splitlines()
    parts = [
        tyro.constructors.StructFieldSpec(
            name=f"part_{number}",
            type=Annotated[kind, tyro.conf.arg(name=str(number) if several else "")],  # type: ignore[arg-type]
            default=default,
            helptext=f"{about}{f' ({number + 1} of {len(info.default)})' if several else ''}",
        )
        for number, default in enumerate(info.default)
    ]
    return tyro.constructors.StructConstructorSpec(instantiate=lambda **made: tuple(made.values()), fields=tuple(parts))


def _is_numbered(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(is_dataclass(item) for item in value)


def _numbered_options(config: Any, prefix: str = "--") -> dict[str, list[str]]:
    """Other names of the options of each tuple of dataclasses in `config`, and the options that each stands for: without a
    number for all, and where there is but one, with a number for the one without."""
    found: dict[str, list[str]] = {}
    for name, value in vars(config).items():
        if is_dataclass(value):
            found |= _numbered_options(value, f"{prefix}{name.replace('_', '-')}.")
        elif _is_numbered(value):
            for option in (field.name.replace("_", "-") for field in fields(value[0])):
                numbered = [f"{prefix}{number}.{option}" for number in range(len(value))]
                one = {numbered[0]: [f"{prefix}{option}"]}
                found |= one if len(value) == 1 else {f"{prefix}{option}": numbered}
    return found


def _for_all(args: Sequence[str], numbered: Mapping[str, list[str]]) -> list[str]:
    """`args` with each option that stands for several given as all of these, with its values."""
    spread: list[str] = []
    starts = [number for number, token in enumerate(args) if token.startswith("--") or number == 0]
    for start, stop in itertools.pairwise([*starts, len(args)]):
        flag, equals, value = args[start].partition("=")
        for option in numbered.get(flag.replace("_", "-"), [flag]):
            spread += [f"{option}{equals}{value}", *args[start + 1 : stop]]
    return spread


def _asks_for_help(arguments: Sequence[str]) -> bool:
    return "-h" in arguments or "--help" in arguments


def _reflow(text: str) -> str:
    """Paragraphs at the width of the terminal; indented lines (commands) stay as they are."""
    width = shutil.get_terminal_size().columns
    paragraphs = text.strip().split("\n\n")
    return "\n\n".join(
        paragraph if paragraph.startswith(" ") else textwrap.fill(paragraph, width) for paragraph in paragraphs
    )


def _help_hint(prog: str | None) -> str:
    return f"`{prog} --help` lists the options" if prog else "--help lists the options"


def _known_flags(run: Callable[[list[str]], Any]) -> list[str]:
    """Every option's long name, read off the help page: the one place that has tyro's final spelling of each."""
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        run(["--help"])
    return sorted(set(re.findall(r"--[a-z0-9][\w.-]*", page.getvalue())))


def _one_line(stop: SystemExit, box: str, prog: str | None) -> str:
    """tyro's error as one line: the dataclass's own message where validation failed, else the first part of the box."""
    cause: BaseException | None = stop
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__context__
    rows = [row.strip("│ ") for row in box.splitlines() if not row.startswith(("╭", "╰"))]
    paragraphs: list[list[str]] = [[]]
    for row in rows:  # a rule ends what is wrong and starts the help that follows it
        if row and set(row) <= {"─", "-"}:
            paragraphs.append([])
        else:
            paragraphs[-1].append(row)
    # Where the terminal's characters allow no frame, the frame's title is a paragraph of its own.
    framed = "╭" in box or len(paragraphs) == 1
    message = " ".join(paragraphs[0 if framed else 1]).strip().rstrip(".")
    return f"{message or 'wrong command line'}; {_help_hint(prog)}"
