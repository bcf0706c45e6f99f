"""What `embed` can be told of a teacher that is no model on this machine: ready vectors, and an endpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class ReadySettings:
    """One entry of `ready`: where the vectors of a part lie."""

    path: str  # Parquet (a file, a folder, a glob), .npy, a FAISS index, or the folder of a LanceDB database
    ids: str | None = None  # column of the ids; of .npy and FAISS a file of them, one a line, in the order of the rows
    vectors: str | None = None  # column of the vectors; None: the only one that can be
    table: str | None = None  # of a LanceDB database


@dataclass
class EndpointSettings:
    """`endpoint`: where the teacher answers, and how it may be asked."""

    url: str  # such as https://api.openai.com/v1, or http://127.0.0.1:8080 of text-embeddings-inference
    kind: Literal["openai", "tei"] = "openai"  # POST url/embeddings, or POST url/embed
    key_variable: str | None = None  # the environment variable that holds the key; None: none is sent
    batch: int | None = None  # texts a request; None: 128, or 32 of TEI, which takes no more by default
    connections: int = 4  # requests at a time
    requests_a_minute: float | None = None  # None: no limit but what the endpoint itself says
    timeout_s: float = 60.0  # for one answer
    retries: int = 6  # of one request, after 429, 5xx and broken connections
    price: float | None = None  # of a million tokens, in your currency
    max_cost: float | None = None  # nothing is sent where the estimate is above it
    max_characters: int | None = None  # a longer text is cut; None: the endpoint says what it does not take
    query_prompt: str = ""  # goes before every query
    document_prompt: str = ""  # goes before every ad
    query_fields: dict[str, Any] = field(
        default_factory=dict
    )  # more of a request's JSON, of queries: {input_type: query}
    document_fields: dict[str, Any] = field(default_factory=dict)  # the same of ads
