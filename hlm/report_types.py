"""What report.json and latency.json hold, as types: one word for each figure, for whoever writes or reads them.

Keys that are named after a cut-off, such as "ndcg@10", are in mappings; `hlm.report_files` writes and reads the files.
"""
# No `from __future__ import annotations`: as texts, annotations would not say which keys may be missing.

from typing import Any, Literal, NotRequired, TypedDict

SCHEMA_VERSION = 1  # of both files; what files without a version hold as well


class Recovery(TypedDict):
    """Student over teacher: 1.0 is the teacher's figure."""

    value: float | None  # None where it is undefined
    ci95: list[float] | None  # the lowest and highest of the 95% interval; None where it is undefined
    reason: NotRequired[str]  # why one of them is None


class Environment(TypedDict, total=False):
    """Where figures come from."""

    command: str
    date: str  # UTC
    git_commit: str | None
    python: str
    system: str
    versions: dict[str, str]  # package -> version
    cpu: str | None
    cores: int
    gpu: str | None
    encoders: dict[str, str]  # report.json: system -> fingerprint
    corpus: str  # report.json: fingerprint of the ads' texts


class OnlyFound(TypedDict):
    """Relevant ads among the first k that one retriever of an ensemble found and no other."""

    only: int
    found: int  # by any of them
    share: Recovery  # only / found


class Interleaving(TypedDict):
    """Team-draft interleaving with simulated clicks; see `hlm.evaluation.interleaving`."""

    simulated: bool  # always true: nobody clicked
    impressions: int
    wins: float  # share of the impressions in which the ensemble with this retriever had more clicks
    ties: float
    losses: float
    preference: Recovery  # wins + ties / 2; 0.5: no difference


class Contribution(TypedDict):
    """What one retriever adds to an ensemble: the ensemble beside the same one without it."""

    weights_without: list[float] | None  # of the others; None where ranks are fused
    without: dict[str, float]  # metric -> mean of the ensemble without it
    uplift: dict[str, Recovery]  # metric -> with over without, minus 1
    only_found: OnlyFound
    interleaving: Interleaving


class FusionReport(TypedDict):
    """One ensemble; its scores stand among the systems."""

    systems: list[str]
    method: str
    normalisation: str | None
    weights: list[float] | None
    weights_from: str | None  # "given", or the split that they were chosen on
    chosen_ndcg: float | None  # nDCG@k on that split
    members: dict[str, Contribution]


class AtThreshold(TypedDict):
    """What is shown where only ads among the first k with a least score are."""

    precision: Recovery  # share of the shown ads that are relevant
    coverage: float  # share of the queries with an ad
    kept: float | None  # share of the relevant ads among the first k that is left
    shown_per_query: float


class Threshold(TypedDict):
    threshold: float | None  # None: no least score keeps the precision
    reason: NotRequired[str]
    chosen_on: NotRequired[AtThreshold]
    reported: NotRequired[AtThreshold]


class Thresholds(TypedDict):
    """The least scores that keep a stated precision, chosen on one split and reported on another."""

    wanted_precision: float
    split: str  # that they were chosen on
    systems: dict[str, Threshold]


class ByCount(TypedDict):
    """Figures in which each query weighs as often as it was typed."""

    searches: int  # the sum of the counts
    systems: dict[str, dict[str, float]]  # system -> metric -> weighted mean
    recovery_by_system: dict[str, dict[str, Recovery]]


class Report(TypedDict):
    """report.json. Beside these keys it has "overlap@k": the student's, or None."""

    schema_version: NotRequired[int]
    dataset: str
    split: str
    k: int
    queries: int
    relevance_level: int
    systems: dict[str, dict[str, float]]  # system -> metric -> mean over queries; and parameter counts
    recovery: dict[str, Recovery]  # metric -> that of "student"
    slices: dict[str, dict[str, dict[str, Any]]]  # what queries are grouped by -> group -> its figures
    recovery_by_system: dict[str, dict[str, Recovery]]
    fusions: NotRequired[dict[str, FusionReport]]
    thresholds: NotRequired[Thresholds]
    by_count: NotRequired[ByCount]
    environment: Environment


Percentile = Literal["p50", "p95", "p99"]


class Latency(TypedDict):
    """Milliseconds of one query."""

    p50: float
    p95: float
    p99: float
    samples: int
    contaminated: int  # of them
    over: str  # what the figures rest on: "clean", or "all" where no sample was clean


class Throughput(TypedDict):
    queries_per_s: float
    blocks: int
    contaminated: int  # of them
    over: str


class Ratio(TypedDict):
    """How many times better than another system."""

    p50: float
    p95: float
    p99: float
    throughput: float
    p50_by_length: dict[str, float]
    p50_range: NotRequired[list[float]]  # the lowest and highest within one repeat


class ColdStart(TypedDict):
    total_s: float
    import_s: float
    load_s: float
    first_query_s: float
    peak_memory_mib: float
    peak_gpu_memory_mib: NotRequired[float]
    processes: int
    contaminated: NotRequired[int]
    over: NotRequired[str]
    other_load: float | None


class Quality(TypedDict, total=False):
    system: str  # of report.json
    metric: str
    ndcg: float
    measured: bool  # in this run, not read from the report
    recovery: float | None
    recovery_ci95: list[float] | None
    recovery_reason: str
    overlap: float | None


# "with" is a word of Python's.
Agreement = TypedDict(
    "Agreement",
    {
        "with": str,  # the system that runs the same model
        "k": int,
        "min_cosine": float,
        "mean_cosine": float,
        "overlap": NotRequired[float],
        "ratio": NotRequired[Ratio],
    },
)


class NewWords(TypedDict):
    p50_ms: float
    known_p50_ms: float
    samples: int


class Floor(TypedDict):
    """A system's figures over what its machine allows; see `hlm.benchmark.floor.floor_of`."""

    weight_mib: float
    tokens: float
    gflop: float
    memory_ms: float
    arithmetic_ms: float
    floor_ms: float
    over: float
    gemm_share: float
    left: NotRequired["Floor"]  # of what is not looked up


class SearchedIndex(TypedDict):
    """The index that a system searches in every call: its times are from text to ads."""

    engine: str
    factory: str
    ads: int
    k: int
    recall: NotRequired[float]  # of the exact neighbours, as its manifest says for this k


class MeasuredSystem(TypedDict):
    """One system of latency.json. What it is, is written beside these keys, as its backend tells it."""

    backend: str
    engine: NotRequired[str]
    precision: NotRequired[str]
    dtype: NotRequired[str]
    settings: dict[str, Any]
    latency_ms: dict[str, Latency]  # "all", or a query's length in words -> figures
    throughput: dict[str, Throughput]  # batch size -> figures
    best_batch_size: int
    best_queries_per_s: float
    ratio: Ratio  # to the reference
    index: NotRequired[SearchedIndex]
    cold_start: NotRequired[ColdStart]
    quality: NotRequired[Quality]
    agreement: NotRequired[Agreement]
    new_words: NotRequired[NewWords]
    floor: NotRequired[Floor]
    derived: NotRequired[str]  # from which depths
    weights: NotRequired[str]
    input: NotRequired[str]


class BlockRecord(TypedDict):
    """Consecutive calls of one system at one batch size."""

    system: str
    repeat: int
    batch_size: int
    other_load: float | None  # share of the CPUs that other processes took; None where it cannot be read
    contaminated: bool
    queries_per_s: float
    calls: int
    p50_ms: float


class Rates(TypedDict):
    bandwidth_gb_per_s: dict[str, float]  # MiB that are streamed -> rate
    gemm_gflop_per_s: dict[str, float]  # precision -> rate
    other_load: float | None


class CheckedBudget(TypedDict):
    system: str
    budget: str
    wanted: float
    bound: str  # "at most" or "at least"
    found: float | None
    passed: bool | None  # None where it can be called neither kept nor broken, for the "reason"
    reason: NotRequired[str]


class LatencyReport(TypedDict):
    """latency.json."""

    schema_version: NotRequired[int]
    data: str
    split: str
    queries: int
    lengths: dict[str, int]  # a query's length in words -> how many there are
    reference: str
    settings: dict[str, Any]
    systems: dict[str, MeasuredSystem]
    blocks: list[BlockRecord]
    rates: NotRequired[Rates]
    budgets: list[CheckedBudget]
    environment: Environment
