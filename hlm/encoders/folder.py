"""Every file of a saved encoder but its weights, read without torch: what serves, exports, times and describes a folder
asks here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from hlm import __version__
from hlm.artefacts import MANIFEST, SCHEMA_VERSION, HlmError
from hlm.encoders.families import Family, known, longest_text
from hlm.fields import REMEDY, field, optional, read_json
from hlm.integrity import check_files

# As hlm.json names them. "lookup", of small students: fp32 with fewer multiply-adds. Beside each may lie <name>_data.
GRAPHS = {"fp32": "onnx/model.onnx", "lookup": "onnx/model_lookup.onnx", "int8": "onnx/model_quantized.onnx"}
MODULES, TOKENIZER, ARCHITECTURE = "modules.json", "tokenizer.json", "config.json"
TOKENIZER_SETTINGS, LIMITS, SETTINGS = (
    "tokenizer_config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
READ = (MODULES, TOKENIZER, TOKENIZER_SETTINGS, LIMITS, ARCHITECTURE, SETTINGS)
# Ways of pooling -> the flags of older sentence-transformers, after "pooling_mode_".
POOLING = {
    "cls": "cls_token",
    "mean": "mean_tokens",
    "max": "max_tokens",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean_tokens",
    "lasttoken": "lasttoken",
}
NO_LIMIT = 2**31  # tokens; transformers writes 10^30 where a tokenizer has no limit


class Module(NamedTuple):
    """A part of a sentence-transformers model: its class by its whole name, and its folder ("" is the encoder's)."""

    type: str
    path: str

    @property
    def name(self) -> str:
        return self.type.rsplit(".", 1)[-1]


class EncoderFolder:
    """A saved encoder. Nothing is read before it is asked for, but for hlm.json.

    Attributes:
        folder: where it lies.
        manifest: hlm.json; {} of a folder without one.
        records: path -> fingerprint of the folder's files, from hlm.json; None: it has none.

    Raises:
        HlmError: hlm.json is damaged, or of another schema. Every method raises it where a file that it reads is.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = self.json(MANIFEST)
        version = self.manifest.get("schema_version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            raise HlmError(
                f"{self.folder / MANIFEST} has schema version {version}, this HLM ({__version__}) reads "
                f"{SCHEMA_VERSION}; write the artefact again with this version"
            )
        self.records: dict[str, str] | None = None
        if "files" in self.manifest:
            self.records = field(self.manifest, dict, "files", where=self.folder / MANIFEST)

    # ---- what hlm.json tells

    def check(self, names: Iterable[str]) -> None:
        """Refuses files that are about to be read and are not those that hlm.json tells of; where it keeps no records,
        every file is taken."""
        if self.records is not None:
            check_files(self.folder, self._told(), names)

    def check_graph(self, name: str) -> None:
        """Refuses a graph, by its name in `GRAPHS`, and weights beside it that are not those that hlm.json tells of."""
        check_files(self.folder, self._told(), [GRAPHS[name], f"{GRAPHS[name]}_data"])

    def check_all(self) -> None:
        """Reads every file that hlm.json tells of, once, and refuses one that is missing, changed or cut short."""
        told = self._told()
        check_files(self.folder, told, told)

    def _told(self) -> dict[str, str]:
        """Path -> fingerprint, from `files` and from what `onnx` says of graphs."""
        where, files = self.folder / MANIFEST, self.records or {}
        graphs: dict[str, str] = {}
        for name, record in self.graphs().items():
            graphs |= graph_files(name, record, where)
        for file, found in graphs.items():
            if files.get(file, found) != found:
                raise HlmError(
                    f"{where}: expected one fingerprint of {file}, found {files[file]} in 'files' and {found} in "
                    f"'onnx'; {REMEDY}"
                )
        return graphs | files

    def graphs(self) -> dict[str, Any]:
        """Name in `GRAPHS` -> what hlm.json says of that graph."""
        found = optional(self.manifest, dict, "onnx", where=self.folder / MANIFEST) or {}
        return {name: found[name] for name in GRAPHS if name in found}

    def encoder(self) -> str | None:
        """The encoder's fingerprint."""
        return optional(self.manifest, str, "encoder", where=self.folder / MANIFEST)

    def teacher(self) -> str | None:
        """The fingerprint of the teacher that it was aligned to."""
        where = self.folder / MANIFEST
        inputs = optional(self.manifest, dict, "inputs", where=where) or {}
        return optional(inputs, str, "teacher", where=where)

    # ---- the model's own files

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file; {} where there is no such file."""
        path = self.folder / name
        return read_json(path) if path.is_file() else {}

    def modules(self) -> list[Module]:
        """What the model is made of, in order."""
        path = self.folder / MODULES
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise HlmError(f"{path}: expected a list of modules, found none ({error}); {REMEDY}") from error
        parts = field({"modules": listed}, list, "modules", where=path)
        return [Module(*(field(part, str, name, where=path) for name in ("type", "path"))) for part in parts]

    def module(self, name: str) -> Module:
        """The first module of that class, such as "Pooling"."""
        found = [module for module in self.modules() if module.name == name]
        if not found:
            raise HlmError(f"{self.folder / MODULES}: expected a module of class {name}, found none; {REMEDY}")
        return found[0]

    def is_static(self) -> bool:
        """Whether it looks up and averages token vectors, without any layer."""
        return self.modules()[0].name == "StaticEmbedding"

    def pooling(self) -> str:
        """The way of pooling, a key of `POOLING`; several are joined by "+"."""
        file = f"{self.module('Pooling').path}/config.json"
        config = self.json(file)
        modes = config.get("pooling_mode")
        if modes is None:
            modes = [mode for mode, flag in POOLING.items() if config.get(f"pooling_mode_{flag}")]
        modes = [modes] if isinstance(modes, str) else modes
        if not isinstance(modes, list) or not modes or set(map(str, modes)) - set(POOLING):
            raise HlmError(
                f"{self.folder / file}: expected pooling among {', '.join(POOLING)}, found {modes or 'none'}; {REMEDY}"
            )
        return "+".join(modes)

    def heads(self) -> list[str]:
        """Folders of the linear layers behind the pooling, in order."""
        return [module.path for module in self.modules() if module.name == "Dense"]

    def activation(self, head: str) -> str:
        """The class in torch.nn of what follows a linear layer, "Identity" where that is nothing."""
        file = f"{head}/config.json"
        name = optional(self.json(file), str, "activation_function", where=self.folder / file)
        name = "torch.nn.modules.activation.Tanh" if name is None else name  # as sentence-transformers reads it
        found = re.fullmatch(r"torch\.nn\.modules\.\w+\.([A-Za-z]\w*)", name)
        if found is None:
            raise HlmError(
                f"{self.folder / file}: expected an activation_function of torch.nn, found {name!r}; correct it"
            )
        return found[1]

    def prompts(self) -> dict[str, str]:
        """Role -> what goes before every text of that role."""
        where = self.folder / SETTINGS
        prompts = optional(self.json(SETTINGS), dict, "prompts", where=where) or {}
        return {role: optional(prompts, str, role, where=where) or "" for role in prompts}

    def prompt(self, role: str | None = "query") -> str:
        """What goes before every text of that role; "" where that is nothing."""
        return self.prompts().get(role, "") if role else ""

    def longest(self) -> int | None:
        """Tokens of the longest text, special ones counted, where sentence-transformers cuts; None: nowhere."""
        limits = [
            self._limit(LIMITS, "max_seq_length"),
            self._limit(TOKENIZER_SETTINGS, "model_max_length"),
            self._limit(ARCHITECTURE, "max_position_embeddings"),
        ]
        if limits[-1] is not None:
            limits[-1] = longest_text(self.json(ARCHITECTURE))
        return min((limit for limit in limits if limit is not None), default=None)

    def _limit(self, file: str, name: str) -> int | None:
        limit = self.json(file).get(name)
        if limit is None or (name == "max_position_embeddings" and limit == -1):  # which stands for none there
            return None
        number = isinstance(limit, int | float) and not isinstance(limit, bool) and limit >= 1
        if not number or (limit < NO_LIMIT and limit != int(limit)):
            raise HlmError(
                f"{self.folder / file}: expected a number of tokens from 1 for '{name}', found {limit!r}; correct it, "
                "or copy the folder again"
            )
        return int(limit) if limit < NO_LIMIT else None

    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer, cutting where sentence-transformers cuts and never padding."""
        path, settings = self.folder / TOKENIZER, self.folder / TOKENIZER_SETTINGS
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no class of its own
            raise HlmError(f"{path}: expected a tokenizer, found {str(error)[:200]}; {REMEDY}") from error
        side = optional(self.json(TOKENIZER_SETTINGS), str, "truncation_side", where=settings) or "right"
        return cutting(tokenizer, self.longest(), side, where=settings)

    def body_weights(self) -> int:
        """About how many weights lie outside the embedding tables; 0 where the configuration does not tell."""
        config = self.json(ARCHITECTURE)
        family = known(config) or Family()
        hidden, ffn, layers = (config.get(name, 0) for name in (family.hidden, family.ffn, family.depth))
        if not all(isinstance(size, int) for size in (hidden, ffn, layers)):
            return 0
        return layers * hidden * (4 * hidden + 2 * ffn)


def graph_files(name: str, record: Any, where: Path) -> dict[str, str]:
    """File -> fingerprint of a graph and of its weights, where these lie beside it.

    Args:
        name: of the graph, see `GRAPHS`.
        record: "file" and "fingerprint" of it, and "data", the same of its weights.
        where: the manifest, for the message.

    Raises:
        HlmError: a damaged record.
    """
    file, holder = GRAPHS[name], {"onnx": {name: record}}
    parts = {file: (), f"{file}_data": ("data",)} if isinstance(record, dict) and "data" in record else {file: ()}
    found = {}
    for expected, path in parts.items():
        named = field(holder, str, "onnx", name, *path, "file", where=where)
        if named != expected:
            raise HlmError(f"{where}: expected a record of {expected}, found one of {named}; {REMEDY}")
        found[expected] = field(holder, str, "onnx", name, *path, "fingerprint", where=where)
    return found


def cutting(tokenizer: Tokenizer, limit: int | None, side: str, *, where: str | Path) -> Tokenizer:
    """The tokenizer, made to cut texts to so many tokens on this side and to pad none."""
    tokenizer.no_padding()
    if side not in ("right", "left"):
        raise HlmError(f"{where}: expected truncation_side right or left, found {side!r}; correct it")
    if limit is not None:
        special = tokenizer.num_special_tokens_to_add(False)
        if limit <= special:
            raise HlmError(
                f"{where}: expected room for a text in the model's limit of {limit} tokens, found {special} special "
                "ones in every text; correct max_seq_length"
            )
        tokenizer.enable_truncation(limit, direction=side)
    return tokenizer
