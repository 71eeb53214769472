"""`bushpc config find | completion`: settings by what they mean, and the words that a shell offers after Tab."""

from __future__ import annotations

import difflib
import typing as t
from pathlib import Path

from bushpc.cli.command import JSON, Arguments, Command, Group, option
from bushpc.errors import ConfigError

if t.TYPE_CHECKING:
    from bushpc.config import Described

RUNS = ("status", "resume", "retry", "cancel", "report", "compare", "audit", "postprocess", "predict", "export", "test")
# Bash takes `=` for the end of a word, so what stands before it is given again and cut off the answers.
SCRIPTS = {
    "bash": """_bushpc() {
  local line=${COMP_LINE:0:COMP_POINT} word before
  word=${line##* }
  mapfile -t COMPREPLY < <(bushpc completion words -- $line 2>/dev/null $([[ $line == *' ' ]] && printf "''"))
  before=${word%"${word##*[=:]}"}
  COMPREPLY=("${COMPREPLY[@]#"$before"}")
  [[ ${COMPREPLY[0]} == *[=/] ]] && compopt -o nospace
}
complete -o default -F _bushpc bushpc""",
    "zsh": """#compdef bushpc
_bushpc() {
  local -a found
  found=("${(@f)$(bushpc completion words -- "${(@)words[1,CURRENT]}" 2>/dev/null)}")
  compadd -Q -S '' -- $found
}
compdef _bushpc bushpc""",
    "fish": """complete -c bushpc -f -a \\
  '(bushpc completion words -- (commandline -opc) (commandline -ct) 2>/dev/null)'""",
}


def find(given: Arguments) -> int:
    """Print the settings that fit; status 1 if none does."""
    from bushpc.cli.settings import print_described
    from bushpc.config import compose, described

    asked = [word for word in given.words if "=" not in word]
    if not asked:
        raise ConfigError("bushpc config find: say what to look for. Example: bushpc config find learning rate")
    chosen = [word for word in given.words if "=" in word]
    settings = [*described(), *(described(type(compose(chosen).model)) if chosen else [])]
    found = matching(settings, asked)
    if found:
        print_described(found, as_json=given.json)
        return 0
    vocabulary = {part for each in settings for part in each.about.sentence.lower().replace(",", " ").split()}
    near = [name for word in asked for name in difflib.get_close_matches(word.lower(), sorted(vocabulary), n=1)]
    hint = f" Try: bushpc config find {' '.join(near)}." if near and near != asked else ""
    print("{}" if given.json else f"no setting has all of: {' '.join(asked)}.{hint} All: bushpc config --all")
    return 1


def matching(settings: t.Sequence[Described], asked: t.Sequence[str]) -> list[Described]:
    """Those whose name or sentence has all words; first those whose name has more of them."""
    terms = [word.lower() for word in asked]

    def in_name(each: Described) -> int:
        return sum(term in each.key.lower() for term in terms)

    found = [each for each in settings if all(term in f"{each.key} {each.about.sentence}".lower() for term in terms)]
    return sorted(found, key=in_name, reverse=True)


def completion(given: Arguments) -> None:
    if given.what == "words":
        print("\n".join(offered([word for word in given.words if word != "--"])))
        return
    print(SCRIPTS[given.what])


def offered(line: t.Sequence[str]) -> list[str]:
    """What may stand in place of the last word of a command line that begins with `bushpc`."""
    from bushpc.cli.app import commands

    before, last = list(line[1:-1]), line[-1] if len(line) > 1 else ""
    last = "" if last == "''" else last
    names = [name for name in (" ".join(before[:2]), *before[:1]) if name in commands()]
    found = [name[len(" ".join([*before, ""])) :] for name in commands() if name.startswith(" ".join([*before, last]))]
    if names:
        found += _of_command(commands()[names[0]], last)
    return sorted({word for word in found if word.startswith(last)})


def _of_command(command: Command, last: str) -> list[str]:
    found = [name for each in command.options for name in each.names if name.startswith("-")]
    found += [f"{word.name}=" for word in command.words.table] if command.words else []
    if command.name in RUNS:
        found += [str(path.parent) for path in Path().glob(f"{last.rpartition('/')[0] or 'runs'}/*/run.json")]
    if command.settings or command.name in ("resume", "retry"):
        found += _settings(command, last)
    return found


def _settings(command: Command, last: str) -> list[str]:
    from bushpc.config import config_names, described, group_names

    groups = {**group_names(), **({"grid": config_names("grid")} if command.name == "grid" else {})}
    group, equals, _ = last.partition("=")
    if equals:
        return [f"{group}={name}" for name in groups.get(group, [])]
    return [*(f"{name}=" for name in groups), *(f"{each.key}=" for each in described())]


GROUP = Group(
    "Settings",
    16,
    (
        Command(
            name="config find",
            summary="Find settings by what they mean.",
            run=find,
            example="bushpc config find learning rate",
            options=(
                option("words", nargs="*", metavar="WORD", help="parts of names or sentences; model=… adds a model's"),
                JSON,
            ),
        ),
        Command(
            name="completion",
            summary="Print a script that completes commands, settings and runs in a shell.",
            run=completion,
            example="bushpc completion bash",
            options=(
                option("what", choices=(*SCRIPTS, "words"), help="the shell; `words` is what the scripts call"),
                option("words", nargs="*", metavar="WORD", help="the command line so far, for `words`"),
            ),
            notes=(
                'bash: eval "$(bushpc completion bash)" in ~/.bashrc; zsh: the same in ~/.zshrc, after compinit; fish: '
                "bushpc completion fish > ~/.config/fish/completions/bushpc.fish",
            ),
        ),
    ),
)
