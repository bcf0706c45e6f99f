"""What must not leave the machine. `public` cuts paths to their last name and strikes out secrets; `refuse_secrets`
searches what is to be published, and stops it where a secret or a name of this machine is left.

The one place for it: manifests, reports, cards, uploads, the demo's page and the Hub's error messages go through here.
"""

from __future__ import annotations

import functools
import getpass
import json
import os
import re
import shlex
import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from huggingface_hub import get_token

from hlm.errors import HlmError

HIDDEN = "***"
# (what it is, texts of which one is in it, its form). The forms are those that the providers document; they are meant
# to miss rather than to refuse ordinary words. The texts only save time: a form is searched where one of them occurs.
SECRETS: list[tuple[str, tuple[str, ...], re.Pattern[str]]] = [
    (what, texts, re.compile(form))
    for what, texts, form in (
        ("a Hugging Face token", ("hf_", "api_org_"), r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"),
        (
            "a private key",
            ("PRIVATE KEY", "PuTTY-User-Key-File"),
            r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----(?:[\s\S]*?-----END [A-Z0-9 ]+-----|[\s\S]*)"
            r"|PuTTY-User-Key-File-\d[\s\S]*",
        ),
        ("an AWS access key", ("A3T", "AKIA", "ASIA", "ABIA", "ACCA"),
         r"\b(?:A3T[A-Z0-9]|AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b"),
        ("an AWS secret key", ("ecret",),
         r"(?i)\b(?:aws_?)?secret_?(?:access_?)?key[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])"),
        ("a Google key", ("AIza", "ya29.", "GOCSPX-"),
         r"\b(?:AIza[\w-]{35}|ya29\.[\w-]{20,}|GOCSPX-[\w-]{28})"),
        ("an Azure key", ("AccountKey=", "AccessKey=", "SharedAccessSignature", "sig=", "Q~"),
         r"(?:AccountKey|SharedAccessKey)=[A-Za-z0-9+/]{40,}={0,2}|\bsv=\d{4}-\d\d-\d\d&\S*\bsig=[\w%+/-]{40,}"
         r"|\bsig=[\w%+/-]{40,}\S*&sv=\d{4}-\d\d-\d\d|(?<![\w~.-])[\w~.]{3}\dQ~[\w~.-]{31,34}"),
        ("a GitHub token", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
         r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,})"),
        ("a GitLab token", ("glpat-",), r"\bglpat-[\w-]{20,}"),
        ("an API key", ("sk-",), r"\bsk-(?:(?:proj|svcacct|admin|ant|or)-[\w-]{20,}|[A-Za-z0-9]{32,})"),
        ("a Slack token", ("xox", "xapp-", "hooks.slack.com"),
         r"\b(?:xox[abeoprs]-[\w-]{10,}|xapp-\d-[\w-]{10,})|hooks\.slack\.com/(?:services|workflows)/T\w+/\w+/\w+"),
        ("a Stripe key", ("_live_", "_test_"), r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{16,}"),
        ("a registry's token", ("npm_", "pypi-AgE"), r"\b(?:npm_[A-Za-z0-9]{36}|pypi-AgE[\w-]{50,})"),
        ("a SendGrid key", ("SG.",), r"\bSG\.[\w-]{16,32}\.[\w-]{16,64}"),
        ("a signed web token", ("eyJ",), r"\beyJ[\w-]{15,}\.eyJ[\w-]{15,}\.[\w-]{16,}"),
        ("an address with a password", ("://",), r"://[^\s/:@\"'<>{}$*]+:[^\s/@\"'<>{}$*]+@[\w.-]+"),
    )
]  # fmt: skip
# Names of settings, options and variables whose values are secret.
_SECRET_NAME = (
    r"[\w-]*(?:password|passwd|passphrase)|(?:[\w-]*[-_])?(?:secret|credentials?)|token"
    r"|(?:[\w-]*[-_])?(?:hub|hf|auth|access|api|session|bearer|refresh|secret|github|wandb)[-_]?token"
    r"|(?:[\w-]*[-_])?(?:api|access|private|secret|account)[-_]?key"
)
SECRET_NAME = re.compile(rf"-*(?:{_SECRET_NAME})", re.IGNORECASE)
SECRET_OPTION = re.compile(rf"(?<![\w-])(--?(?:{_SECRET_NAME})[= ])\S+", re.IGNORECASE)

# How a text begins that is an absolute path, or one relative to a home, a variable or the current folder. A single
# slash or backslash alone says little inside a text: there a second separator has to follow.
_SURE = r"(?:file|local):[\\/]*|[A-Za-z]:[\\/]|~[\w.-]*[\\/]|\.{1,2}[\\/]|\$\{?\w+\}?[\\/]|%\w+%[\\/]|\\\\(?=[\w?.])"
PATH = re.compile(rf"(?:{_SURE}|/|\\(?=\w[^\\/\n]*\\)|(?:~[\w.-]*|\.\.?)$)", re.IGNORECASE)
_BEFORE = r"(?<![\w/\\.~%$*?<)\]}-])(?:(?<!:)|(?!//))"  # not inside a word, a pattern, a tag or an address
_INSIDE = r"(?:(?:{sure})(?:{any}*[\\/])?|(?:/|\\(?=\w))(?=[^\s/\\]){any}*[\\/])"
_EITHER = "|".join(
    rf"{before}{_BEFORE}{_INSIDE.format(sure=_SURE, any=allowed)}"
    for before, allowed in (('(?<=")', r'[^"\n]'), ("(?<=')", r"[^'\n]"), (r"(?<![\"'])", r"[^\n]"))
)
EMBEDDED = re.compile(rf"(?P<folders>{_EITHER})(?P<name>[\w.-]*)", re.IGNORECASE)
HOMES = re.compile(r"(?:^|.*[\\/])(?:home|users)[\\/]+", re.IGNORECASE | re.DOTALL)
URL = re.compile(r"(?!file:|local:)[a-z][a-z0-9+.-]+:(?://|(?![\\/])\S)", re.IGNORECASE)  # also package:NAME/model
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
OURS = re.compile(r"recipes(/[\w-][\w.-]*)+")  # in a checkout of HLM: the same everywhere
# Names of settings and options that hold a folder, a file or a Hub id.
PLACE = re.compile(
    r"-*(?:\w+[_-])?(?:data|dataset|model|student|teacher|vectors|corpus|queries|backbone|output|report|latency|unlabelled"
    r"|source|index|space|checkpoint|config|path|dir|folder|file)s?",
    re.IGNORECASE,
)
_OPERATOR = re.compile(r"[|&;<>]+|\d?>&?\d?")


def public(value: Any, name: str = "") -> Any:
    """`value` as it may be published: in all its texts paths are cut to their last name and secrets struck out.

    A text is a path where it begins as one (`/`, `C:\\`, `\\\\server`, `file:`, `~`, `..`, `$HOME/`), spaces included.
    A relative one of several parts is a path where it exists here, or where its setting is one that holds paths. Hub
    ids, addresses on other machines and files of HLM's own `recipes/` stay. What "command" holds is read as a shell
    reads it. Inside another text a path ends at its closing quote, and without quotes at the last separator of the
    line: too much goes, rather than too little.

    Args:
        value: of JSON: dicts, lists, texts, numbers, None.
        name: of the setting that holds it.
    """
    if isinstance(value, dict):
        items = ((_text(key) if isinstance(key, str) else key, public(item, str(key))) for key, item in value.items())
        return _unique(items)
    if isinstance(value, (list, tuple)):
        return [public(item, name) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if is_secret(name):
        return HIDDEN
    return public_command(value) if re.fullmatch(r"(?:.*_)?command(?:s|_line)?", name) else _text(value, name)


def public_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest whose settings and inputs are `public`. Its further facts are fingerprints, sizes, files of its own
    folder and canary queries: those stay to the letter."""
    return manifest | {name: public(manifest[name], name) for name in ("config", "inputs") if name in manifest}


def public_command(command: str) -> str:
    """A command line whose words are cut like the values of `public`; the values of `--token` and the like are struck
    out. Where nothing has to go it stays as it was written."""
    lexer = shlex.shlex(command.replace("\\\n", " "), posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    if re.search(r"(?<!\w)[A-Za-z]:\\|\\\\\w|\.\.\\", command):  # on Windows a backslash escapes nothing
        lexer.escape = ""
    try:
        words = list(lexer)
    except ValueError:  # a quote that is not closed
        return _text(command)
    clean = _words(words)
    if clean == words:
        return command
    quoted = {word for word in clean if f"'{word}'" in command or f'"{word}"' in command}
    return " ".join(shlex.quote(word) if word in quoted or re.search(r"[\s'\"]|^$", word) else word for word in clean)


def public_error(text: str) -> str:
    """The text of an error as a log may show it: without secrets, the token of this machine, and the queries of
    addresses, which carry signatures."""
    text = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1?...", without_secrets(text))
    return text.replace(token, HIDDEN) if (token := get_token()) else text


def portable(settings: Any) -> Any:
    """Settings that mean the same on any machine: without secrets, empty values, and all texts that can be paths."""
    if isinstance(settings, dict):
        kept = {key: portable(value) for key, value in settings.items() if not is_secret(str(key))}
        return {key: value for key, value in kept.items() if value not in (None, {}, [], "")}
    if isinstance(settings, list):
        return [portable(value) for value in settings]
    return None if isinstance(settings, str) and re.search(r"[/\\:]", settings) else settings


def is_secret(name: str) -> bool:
    """Whether the value of a setting, an option or a variable of this name is a secret."""
    return bool(SECRET_NAME.fullmatch(name))


def without_secret_options(words: Sequence[str]) -> list[str]:
    """The words of a command with the values of `--token` and the like, and what has a secret's form, struck out; paths
    stay."""
    shown = []
    for before, word in zip(["", *words], words, strict=False):
        option, equals, _ = word.partition("=")
        if equals and is_secret(option):
            word = f"{option}={HIDDEN}"
        elif before.startswith("-") and is_secret(before) and not word.startswith("-"):
            word = HIDDEN
        shown.append(without_secrets(word))
    return shown


def without_secrets(text: str) -> str:
    """`text` with every token and key struck out whose form is known."""
    for _, known, form in SECRETS:
        if any(one in text for one in known):
            text = form.sub(HIDDEN, text)
    return text


def _unique(items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """A dict that loses no item where two keys were cut to the same name."""
    found: dict[Any, Any] = {}
    for key, value in items:
        name, number = key, 2
        while name in found:
            name, number = f"{key} ({number})", number + 1
        found[name] = value
    return found


def _text(text: str, name: str = "") -> str:
    text = without_secrets(SECRET_OPTION.sub(rf"\1{HIDDEN}", text))
    if "::" in text and any(PATH.match(part) for part in text.split("::")):  # fsspec: zip://x.csv::/home/jane/x.zip
        return "::".join(map(_text, text.split("::")))
    if PATH.match(text) or _relative(text, name):
        return _last_name(text)
    return EMBEDDED.sub(lambda path: "~" if HOMES.fullmatch(path["folders"]) else path["name"], text)


def _relative(text: str, name: str) -> bool:
    """Whether a text that does not begin as a path is one all the same."""
    if not name or not re.search(r"[\\/]", text) or URL.match(text) or OURS.fullmatch(text):
        return False
    if os.path.exists(text):
        return True
    return bool(PLACE.fullmatch(name)) and not HUB_ID.fullmatch(text) and not re.search(r"[*?{}<>|\n]", text)


def _last_name(path: str) -> str:
    if re.match(r"(?:file|local):", path, re.IGNORECASE):
        path = unquote(re.sub(r"^\w+:", "", path))
    parts = [part for part in re.split(r"[\\/]+", path.strip()) if part]
    if not parts:
        return path.strip()
    own = parts[-2].lower() in ("home", "users") if len(parts) > 1 else re.fullmatch(r"~[\w.-]*|root", parts[0])
    return "~" if own else parts[-1]  # the last name of /home/jane is the user's


def _words(words: Sequence[str]) -> list[str]:
    clean: list[str] = []
    at, program, before = 0, True, ""
    while at < len(words):
        option, equals, value = words[at].partition("=")
        if not (equals and re.fullmatch(r"-{0,2}[\w.-]+", option)):
            option, equals, value = "", "", words[at]
        last = at
        if PATH.match(value) and (equals or not program):
            last = _end_of_path(words, at)
            value = " ".join([value, *words[at + 1 : last + 1]])
        name = option if equals else before if before.startswith("-") and "=" not in before else "word"
        if is_secret(name) and not value.startswith("-"):
            value = HIDDEN
        clean.append(option + equals + _text(value, name))
        # A=1 B=2 program: the first word that is no assignment, and the first after && and the like.
        program = (program and bool(equals)) or bool(_OPERATOR.fullmatch(words[last]))
        before, at = words[last], last + 1
    return clean


def _end_of_path(words: Sequence[str], start: int) -> int:
    """Where a path with spaces that nobody quoted ends: at the last word with a separator before an option, an operator
    or another path."""
    end = start
    for at in range(start + 1, len(words)):
        word = words[at]
        if word.startswith("-") or _OPERATOR.fullmatch(word) or PATH.match(word) or OURS.fullmatch(word):
            break
        if re.search(r"[\\/]", word) and not URL.match(word):
            end = at
    return end


# What is refused.

_BLOCK = 1 << 24  # bytes of a file that are searched at a time
_OVERLAP = 1 << 10  # characters searched again with the next block
NAME_LENGTH = 4  # shorter names are not searched for: they are found in everything
# Nor are names of accounts and machines that everybody has.
COMMON_NAMES = set(
    """account admin administrator agent airflow anonymous azureuser build builder centos circleci cloud cluster coder
    colab compute computer container debian default desktop devcontainer devuser docker ec2-user fedora gitlab github
    gitpod guest home host hostname jenkins jovyan jupyter kaggle kubernetes laptop linux local localdomain localhost
    machine macbook master nobody node nonroot notebook opc project python ray root runner sagemaker server service
    shared slurm spark student sysadmin system teacher test tester ubuntu user users vagrant vscode windows worker
    workspace""".split()
)


def machine_names(public_names: Iterable[str] = (), *, in_data: bool = False) -> list[tuple[str, re.Pattern[str]]]:
    """What tells this machine and its user: (what it is, its form) of the home folder, the user's and the host's name.

    Names are found as whole words. Left out are those of fewer than 4 characters, of accounts and machines that
    everybody has (`COMMON_NAMES`), those that HLM's own texts use as words, and `public_names`, such as the owner of
    the repository. Paths below the home folder are found whatever its name.

    Args:
        in_data: for tables and vocabularies, where a user's name may be anybody's: only a telling home folder.
    """
    known = {name.casefold() for name in public_names}
    home = os.path.expanduser("~")
    telling = _telling(os.path.basename(home), known)
    found = []
    if os.path.isabs(home) and os.path.dirname(home) != home and os.path.basename(home).casefold() not in known:
        for one in sorted({home, os.path.realpath(home)}):
            if telling:
                found.append((f"the home folder {one}", _form(one, r"(?![\w.-])")))
            elif not in_data:
                found.append((f"a path of the home folder {one}", _form(one, r"[\\/]", r"(?<![\w.-])")))
    host = socket.gethostname()
    names = {"the user's name": [_user(), os.path.basename(home)]}
    names["the name of this machine"] = [host, host.split(".")[0]]
    for what, given in () if in_data else names.items():
        for one in dict.fromkeys(given):
            if _telling(one, known):
                found.append((f"{what}, {one},", _form(one, r"(?!\w)", r"(?<!\w)")))
    return found


def refuse_secrets(
    name: str,
    content: Path | bytes | str,
    names: Sequence[tuple[str, re.Pattern[str]]] = (),
    remedy: str = "take it out there",
) -> None:
    """Searches a file that is to be published, in pieces, so that any size fits in memory.

    Args:
        name: of the file, for the error. Markdown (.md) is also searched as it reads without its backslashes.
        content: text in UTF-8.
        names: of `machine_names`.
        remedy: what to do, for the error.

    Raises:
        HlmError: a token, a key, or one of `names`; the error says where and what, and shows no secret.
    """
    searched = [*SECRETS, *((what, (), form) for what, form in names)]
    if token := get_token():
        searched.append(("the token of this machine", (token,), re.compile(re.escape(token))))
    for line, text in _blocks(content):
        for written in (text, _unescaped(text)) if name.endswith(".md") else (text,):
            for what, known, form in searched:
                if known and not any(one in written for one in known):
                    continue
                if match := form.search(written):
                    at = line + written.count("\n", 0, match.start())
                    raise HlmError(f"{name}: expected nothing secret, found {what} in line {at}; {remedy}")


def _blocks(content: Path | bytes | str) -> Iterator[tuple[int, str]]:
    """(number of its first line, text) of each piece; pieces overlap."""
    if not isinstance(content, Path):
        yield 1, content if isinstance(content, str) else content.decode(errors="replace").replace("\0", "")
        return
    line, rest = 1, ""
    with open(content, "rb") as file:
        while block := file.read(_BLOCK):
            text = rest + block.decode(errors="replace").replace("\0", "")  # of UTF-16 the letters are left
            yield line, text
            rest = text[-_OVERLAP:]
            line += text.count("\n", 0, len(text) - len(rest))


def _unescaped(markdown: str) -> str:
    text = re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markdown)
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def _form(name: str, after: str, before: str = "") -> re.Pattern[str]:
    """Finds a name as it is, as JSON and addresses write it, and with either separator."""
    spellings = {name, name.replace("\\", "/"), name.replace("\\", "\\\\"), json.dumps(name)[1:-1], quote(name)}
    return re.compile(f"{before}(?:{'|'.join(map(re.escape, sorted(spellings)))}){after}")


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's number without an entry in its list of users
        return ""


def _telling(name: str, known: set[str]) -> bool:
    plain = name.casefold()
    if len(name) < NAME_LENGTH or plain in COMMON_NAMES | known or name.isdigit():
        return False
    return not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", _own_texts())


@functools.cache
def _own_texts() -> str:
    """The package and the cards' templates, which are published too: what they say tells nothing of this machine."""
    package = Path(__file__).resolve().parent
    files = [*package.rglob("*.py"), *package.rglob("*.jinja"), *package.parent.glob("model_cards/*.jinja")]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)
