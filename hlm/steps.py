"""The settings of every step, and the only place of their defaults. `hlm.step_table` says which step has which.

Loads nothing heavy: `hlm --help` reads it too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

PARTS = ("corpus", "unlabelled", "queries")  # of a dataset; embed writes a store of each
RATES = {"help": "others than learning_rate, of which dev may take one"}


@dataclass
class CatalogueConfig:
    """Makes the sample catalogue: ads, judged queries and unlabelled queries, from a seed."""

    output: str = field(metadata={"help": "folder for the catalogue"})
    ads: int = field(default=10_000, metadata={"help": "ads in the catalogue"})
    unlabelled: int = field(default=30_000, metadata={"help": "unlabelled queries"})
    train_queries: int = field(default=8_000, metadata={"help": "judged queries for training"})
    dev_queries: int = field(default=300, metadata={"help": "judged queries for choosing checkpoints"})
    test_queries: int = field(default=600, metadata={"help": "judged queries for evaluation"})
    seed: int = field(default=0, metadata={"help": "the same seed gives the same catalogue"})


@dataclass
class TeacherConfig:
    """Phase 1: LoRA fine-tunes the teacher on query-document pairs and merges it; the adapter is kept beside it."""

    backbone: str = field(metadata={"help": "what is tuned: a folder, a Hub id or package:<package>/<folder in it>"})
    data: str = field(metadata={"help": "the dataset: a folder or a Hub id"})
    output: str = field(metadata={"help": "folder for the merged teacher"})
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "leave out rows without text, and judgements of what is not in the data"}
    )
    min_score: int = field(default=1, metadata={"help": "lowest grade that makes a training pair"})
    pairs_per_query: int | None = field(default=None, metadata={"help": "at most so many pairs of one query, the best"})
    hard_negatives: int = field(default=1, metadata={"help": "documents mined a pair with the backbone; 0: none"})
    queries_per_document: int = field(
        default=1, metadata={"help": "pairs of one document that share a batch: it is encoded once for all of them"}
    )
    oracle: bool = field(default=False, metadata={"help": "read the `oracle` columns, which only exist offline"})
    lora_rank: int = field(default=256, metadata={"help": "rank of the adapter"})
    lora_alpha: int = field(default=512, metadata={"help": "the adapter counts with lora_alpha / lora_rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "probability, before the adapter"})
    temperature: float = field(default=0.02, metadata={"help": "of the contrastive loss: scores are divided by it"})
    margin: float = field(default=0.1, metadata={"help": "a negative that scores above the positive by this is masked"})
    use_in_batch: bool = field(default=True, metadata={"help": "q-d: other pairs' documents"})
    use_query_query: bool = field(default=True, metadata={"help": "q-q: other queries"})
    use_document_document: bool = field(default=True, metadata={"help": "d-d: other documents against the positive"})
    cache_chunk: int | None = field(
        default=None, metadata={"help": "documents encoded at a time (gradient caching); queries as memory then allows"}
    )
    merge_weight: float | list[float] | str = field(
        default=1.0, metadata={"help": "share of what was learnt that is kept; a list or auto: chosen on dev, 0 too"}
    )
    try_learning_rates: list[float] = field(default_factory=list, metadata=RATES)
    dev_documents: int = field(default=2000, metadata={"help": "documents beside those judged, in the dev corpus"})
    max_seq_length: int | None = field(
        default=None, metadata={"help": "tokens a text is cut to; null: the backbone's own limit"}
    )
    dtype: str = field(
        default="float32", metadata={"help": "what the backbone is loaded in: float32, bfloat16 or float16"}
    )


@dataclass
class EmbedConfig:
    """Writes a teacher's vectors of ads and queries into stores, `output/{corpus,unlabelled,queries}`, and with `index`
    an index over the ads.

    A killed run goes on after the last whole shard, and a store that is up to date is left alone.
    """

    model: str = field(
        metadata={"help": "the teacher: a folder, a Hub id or package:...; its name where it is asked, or has answered"}
    )
    data: str = field(metadata={"help": "the dataset: a folder or a Hub id"})
    output: str = field(metadata={"help": "folder for the stores, one a part"})
    endpoint: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "{url, kind: openai or tei, key_variable, price, ...}: the teacher behind an API"},
    )
    ready: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "part -> its ready vectors: a path, or {path, ids, vectors, table}; they are not computed"},
    )
    same_as: str | None = field(
        default=None, metadata={"help": "earlier stores of this endpoint or these ready vectors: their teacher is kept"}
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "leave out rows without text, and judgements of what is not in the data"}
    )
    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": f"which of {', '.join(PARTS)}"})
    index: str | None = field(
        default=None,
        metadata={"help": "builds output/index over the ads: FAISS's Flat or HNSW32, LanceDB's lance:IVF_RQ, ..."},
    )
    index_dim: int | None = field(default=None, metadata={"help": "width of the index, the student's; null: all"})
    index_columns: list[str] = field(
        default_factory=list, metadata={"help": "columns of the corpus that searches of the index can be filtered by"}
    )
    keep_versions: int = field(
        default=3, metadata={"help": "versions of stores and index to keep, where ads or queries have changed"}
    )
    oracle: bool = field(default=False, metadata={"help": "let the teacher read the `oracle` columns as well"})
    dim: int | None = field(default=None, metadata={"help": "keep the first dim values (Matryoshka); null: all"})
    max_seq_length: int | None = field(default=None, metadata={"help": "tokens a text is cut to; null: the model's"})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "what the model computes in; stores are float16 in any case"}
    )
    batch_tokens: int = field(default=4096, metadata={"help": "padded tokens a batch; lower it where memory runs out"})
    shard_rows: int = field(default=65536, metadata={"help": "rows a shard: what a kill can cost"})
    shard: str | None = field(
        default=None, metadata={"help": "i/n, i from 0: write only this task's share of the shards; null: all of them"}
    )
    ray_workers: int | None = field(
        default=None, metadata={"help": "workers of a Ray cluster that write the shards, each on a GPU; null: none"}
    )
    model_revision: str | None = field(default=None, metadata={"help": "revision of a model on the Hub"})
    data_revision: str | None = field(default=None, metadata={"help": "revision of a dataset on the Hub"})


@dataclass
class IndexConfig:
    """Chooses and writes the index that goes online: the fastest that finds enough of the exact neighbours of a
    student's own queries, within memory and time.

    Candidates that are built are kept in `output`.candidates until one is chosen, so a killed run goes on there.
    """

    vectors: str = field(metadata={"help": "the teacher's stores, as recipes/embed.py writes them"})
    student: str = field(metadata={"help": "folder of the student whose queries the index will serve"})
    data: str = field(metadata={"help": "the dataset: its unlabelled queries are searched, without these its queries"})
    output: str = field(metadata={"help": "folder for the index"})
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "leave out rows without text, and judgements of what is not in the data"}
    )
    target_recall: float = field(default=0.98, metadata={"help": "least share of the k exact neighbours that is found"})
    k: int = field(default=100, metadata={"help": "ads that are searched for a query"})
    memory_gb: float | None = field(default=None, metadata={"help": "most gigabytes of the index; null: no bound"})
    p99_ms: float | None = field(
        default=None, metadata={"help": "most milliseconds of one query on one thread, p99; null: no bound"}
    )
    queries: int = field(default=2000, metadata={"help": "queries drawn: half choose, half say what was reached"})
    columns: list[str] = field(
        default_factory=list, metadata={"help": "columns of the corpus that searches can be filtered by"}
    )
    candidates: list[str] = field(
        default_factory=list, metadata={"help": "FAISS factory strings to try; empty: those that suit the catalogue"}
    )
    seed: int = field(default=0, metadata={"help": "draws the queries and the vectors that train a candidate"})


@dataclass
class PruneConfig:
    """Phase 2, the cut alone: a student with fewer layers, narrower FFNs and fewer tokens, without any training.

    With `vocabulary` alone it takes tokens from any student, and texts of the others keep their vectors to the bit.
    """

    model: str = field(metadata={"help": "what is cut: a folder, a Hub id or package:..."})
    data: str = field(metadata={"help": "the dataset whose queries layers and FFN units are scored on"})
    vectors: str = field(metadata={"help": "the teacher's stores: which teacher's space the student searches"})
    output: str = field(metadata={"help": "folder for the pruned student"})
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "leave out rows without text, and judgements of what is not in the data"}
    )
    layers: list[int] = field(default_factory=list, metadata={"help": "layers to keep; empty: `keep` chooses"})
    keep: int | None = field(default=None, metadata={"help": "how many layers to keep, chosen by `method`"})
    method: Literal["middle_skip", "norm_ratio"] = field(
        default="middle_skip", metadata={"help": "how `keep` chooses the layers"}
    )
    ffn: int | None = field(default=None, metadata={"help": "FFN units to keep; null: all"})
    fold: bool = field(
        default=False, metadata={"help": "token embeddings start as what dropped first layers make of each token"}
    )
    vocabulary: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "{keep: N} or {min_count: N}: tokens that the log and the titles use; empty: all stay"},
    )
    static: int | None = field(
        default=None,
        metadata={"help": "whole words of a static student: no layer stays, tokens are looked up; null: layers stay"},
    )
    calibration: int = field(default=512, metadata={"help": "queries that layers and FFN units are scored on"})


@dataclass
class AlignConfig:
    """Phase 2: prunes the student and aligns it to the frozen teacher's query vectors, cut by cut.

    Each finished stage of `cascade` is kept in `output`.stages, so a killed run goes on where it was. Without a cascade
    the student is aligned as it is.
    """

    student: str = field(metadata={"help": "what the first stage starts from: a folder, a Hub id or package:..."})
    data: str = field(metadata={"help": "the dataset: a folder or a Hub id"})
    vectors: str = field(metadata={"help": "the teacher's stores, as recipes/embed.py writes them"})
    output: str = field(metadata={"help": "folder for the aligned student"})
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "leave out rows without text, and judgements of what is not in the data"}
    )
    cascade: list[dict] = field(
        default_factory=list,
        metadata={"help": "stages in order: {layers: 4 or [0, 1, 4, 5], ffn: 1024, epochs: 2}; fold: as in prune"},
    )
    method: Literal["middle_skip", "norm_ratio"] = field(
        default="middle_skip", metadata={"help": "which layers a stage keeps when it gives their number"}
    )
    objective: Literal["l2", "cosine", "kernel", "kl"] = field(
        default="l2", metadata={"help": "what is minimised between the student's and the teacher's query vectors"}
    )
    also: dict[str, float] = field(
        default_factory=dict, metadata={"help": "objectives added to it and their weights, such as {kl: 0.1}"}
    )
    temperature: float = field(default=0.05, metadata={"help": "of the kl objective"})
    kl_documents: int = field(default=4096, metadata={"help": "ads that the kl objective compares the queries with"})
    count_power: float = field(
        default=0.0, metadata={"help": "a query weighs its column `count` to this power, 0 to 1; 0: all weigh the same"}
    )
    head: bool = field(default=False, metadata={"help": "a linear head to the teacher's width, inside the model"})
    parts: list[str] = field(
        default_factory=lambda: ["unlabelled", "train"], metadata={"help": "queries to align on: unlabelled, train"}
    )
    kinds: list[str] = field(
        default_factory=list, metadata={"help": "unlabelled queries of these kinds, by the column `kind`; empty: all"}
    )
    queries: int | None = field(default=None, metadata={"help": "a sample of so many queries; null: all"})
    prompt: bool = field(default=False, metadata={"help": "keep the student's query prompt; alignment teaches it"})
    dropout: float = field(default=0.0, metadata={"help": "probability, in the student while it trains"})
    calibration: int = field(default=512, metadata={"help": "queries that layers and FFN units are scored on"})
    max_seq_length: int | None = field(
        default=None, metadata={"help": "tokens a query is cut to; null: the student's own limit"}
    )


@dataclass
class RefineConfig:
    """Phase 3: trains the student contrastively against the teacher's frozen ad vectors; no ad is encoded.

    Started from a student that was never aligned, it is the paper's naive baseline.
    """

    student: str = field(metadata={"help": "folder of the student to refine"})
    data: str = field(metadata={"help": "the dataset: a folder or a Hub id"})
    vectors: str = field(metadata={"help": "the teacher's stores, as recipes/embed.py writes them"})
    output: str = field(metadata={"help": "folder for the refined student"})
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "leave out rows without text, and judgements of what is not in the data"}
    )
    min_score: int = field(default=1, metadata={"help": "lowest grade that makes a training pair"})
    pool: int = field(
        default=16384, metadata={"help": "ads a step draws as negatives; the whole corpus if it is smaller"}
    )
    hard_negatives: int = field(default=8, metadata={"help": "ads mined a query with the current student; 0: none"})
    refresh_epochs: int = field(default=1, metadata={"help": "mine anew after so many epochs"})
    mask_top: int = field(default=3, metadata={"help": "the teacher's best ads of a query, never its negatives"})
    query_query: bool = field(default=False, metadata={"help": "other queries as negatives as well"})
    temperature: float = field(default=0.02, metadata={"help": "of the contrastive loss: scores are divided by it"})
    margin: float = field(default=0.1, metadata={"help": "a negative that scores above the positive by this is masked"})
    alignment_weight: float = field(
        default=0.0, metadata={"help": "of the L2 to the teacher's query vector, kept beside"}
    )
    try_learning_rates: list[float] = field(default_factory=list, metadata=RATES)
    cache_chunk: int | None = field(default=None, metadata={"help": "rows encoded at a time (gradient caching)"})
    dropout: float = field(default=0.0, metadata={"help": "probability, in the student while it trains"})


@dataclass
class EvaluateConfig:
    """Searches the catalogue with every system: metrics, recovery with intervals, table, plot and report.json.

    What a rerun need not do again is kept under `output`, in runs/ and stores/.
    """

    data: str = field(metadata={"help": "folder or Hub id in the data contract"})
    systems: dict[str, Any] = field(
        metadata={
            "help": "name -> nothing (bm25), a model, or {model or queries (store), corpus (store), index, oracle, ...}"
        }
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "leave out rows without text, and judgements of what is not in the data"}
    )
    output: str = field(default="runs/quickstart", metadata={"help": "folder for the report"})
    revision: str | None = field(default=None, metadata={"help": "Hub revision of the data"})
    split: str = field(default="test", metadata={"help": "the split whose queries are searched"})
    k: int = field(default=10, metadata={"help": "cut-off of precision, nDCG, MRR and overlap"})
    depth: int = field(default=100, metadata={"help": "documents retrieved for each query, at least 100"})
    relevance_level: int | None = field(default=None, metadata={"help": "lowest relevant grade; default 2, or 1"})
    incomplete: bool = field(default=False, metadata={"help": "add condensed nDCG and judged@k"})
    bm25_k1: float = field(default=1.5, metadata={"help": "BM25's k1: how soon a repeated word stops counting"})
    bm25_b: float = field(default=0.75, metadata={"help": "BM25's b: how much long documents are held back, 0 to 1"})
    bootstrap_samples: int = field(default=10_000, metadata={"help": "resamples of the queries for the intervals"})
    bootstrap_seed: int = field(default=0, metadata={"help": "seed of the resampling"})
    slices: dict[str, str] = field(
        default_factory=dict, metadata={"help": "name -> regular expression: queries that match, and the others"}
    )
    fusions: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "name -> {systems, method: rrf or weighted, weights (null: chosen on dev), normalisation}"},
    )
    by_count: bool = field(
        default=False, metadata={"help": "add figures in which a query weighs its column `count`, as searches do"}
    )
    impressions: int = field(default=100, metadata={"help": "simulated impressions of a query, for interleaving"})
    shown_precision: float | None = field(
        default=None, metadata={"help": "share of the shown ads that must be relevant: chooses a least score on dev"}
    )
    dev_split: str = field(default="dev", metadata={"help": "the split that weights and least scores are chosen on"})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; null: a GPU where there is one"})


@dataclass
class System:
    """One entry of `systems`."""

    model: str | None = None  # folder, "package:..." or Hub id; students: the folder that a recipe wrote
    corpus: str | None = None  # store of document vectors; encoded here (backbone, teacher) or the teacher's (students)
    queries: str | None = None  # store of its query vectors, in place of a model: a teacher that cannot be loaded
    index: str | None = None  # folder of an index that is searched in place of the vectors, which are searched exactly
    oracle: bool = False  # the teacher's queries are read with their oracle column
    prompt_name: str | None = "query"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # what the model computes in
    max_seq_length: int | None = None  # the model's own; must be what the store was made with


@dataclass
class Fusion:
    """One entry of `fusions`."""

    systems: list[str]  # two or more of `systems`
    method: Literal["rrf", "weighted"] = "rrf"
    weights: list[float] | None = None  # of "weighted", one for each of `systems`; null: chosen on dev
    normalisation: Literal["minmax", "zscore"] = "minmax"  # of "weighted"


@dataclass
class ExportConfig:
    """Writes the online folder: the student with its ONNX files, and what int8 costs on this data's queries.

    It is what is published, and what `hlm.QueryEncoder` and the demo load.
    """

    student: str = field(metadata={"help": "the student's folder"})
    output: str = field(metadata={"help": "the online folder"})
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "leave out rows without text, and judgements of what is not in the data"}
    )
    data: str | None = field(default=None, metadata={"help": "dataset whose queries the int8 file is judged on"})
    vectors: str | None = field(default=None, metadata={"help": "the teacher's stores, searched for that"})
    split: str = field(default="test", metadata={"help": "the split whose queries int8 is judged on"})
    k: int = field(default=10, metadata={"help": "documents whose overlap with fp32's is counted"})
    lookup: bool = field(default=True, metadata={"help": "write onnx/model_lookup.onnx where it pays: faster, larger"})


@dataclass
class PublishConfig:
    """Publishes a run on the Hub: its student, teacher's adapter, dataset with vectors and index, and the demo.

    Everything is checked before anything is sent. The same run published twice changes nothing.
    """

    student: str = field(metadata={"help": "the online folder: the student with its ONNX files"})
    vectors: str = field(metadata={"help": "the teacher's stores: corpus and queries, and index where it was built"})
    data: str = field(metadata={"help": "the dataset: a folder, published too, or a Hub id that the demo reads"})
    name: str = field(metadata={"help": "what the names of the repositories begin with, and the collection's title"})
    namespace: str | None = field(default=None, metadata={"help": "user or organisation that owns the repositories"})
    teacher: str | None = field(default=None, metadata={"help": "its folder, for the adapter; null: left out"})
    space: str | None = field(default=None, metadata={"help": "the demo's folder; null: left out"})
    report: str | None = field(default=None, metadata={"help": "report.json of recipes/evaluate.py"})
    latency: str | None = field(default=None, metadata={"help": "latency.json of recipes/benchmark.py"})
    student_repo: str | None = field(default=None, metadata={"help": "owner/name; null: NAMESPACE/NAME-student"})
    teacher_repo: str | None = field(default=None, metadata={"help": "owner/name; null: NAMESPACE/NAME-teacher"})
    dataset_repo: str | None = field(default=None, metadata={"help": "owner/name; null: NAMESPACE/NAME-dataset"})
    space_repo: str | None = field(default=None, metadata={"help": "owner/name; null: NAMESPACE/NAME-space"})
    base_model: str | None = field(
        default=None, metadata={"help": "the backbone's Hub id, if the run had it elsewhere"}
    )
    licence: str | None = field(default=None, metadata={"help": "as the Hub writes it, for example apache-2.0"})
    language: list[str] = field(default_factory=list, metadata={"help": "codes of the texts' languages, such as en"})
    unlabelled: bool = field(default=False, metadata={"help": "publish the queries without judgements, often a log"})
    private: bool = field(
        default=False, metadata={"help": "private repositories; the demo then needs a secret HF_TOKEN in its settings"}
    )
    revision: str = field(default="main", metadata={"help": "branch to publish on, made where it is missing"})
    tag: str | None = field(default=None, metadata={"help": "the release's name, for example v1.0; never moved"})
    delete_others: bool = field(default=False, metadata={"help": "delete files that others added on the Hub"})
    overwrite_edited: bool = field(
        default=False, metadata={"help": "overwrite cards and other files that others edited on the Hub"}
    )
    public_names: list[str] = field(
        default_factory=list, metadata={"help": "names of the user, the home or the machine that may be published"}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "print every file, its size, the cards and what would change; send nothing"}
    )
