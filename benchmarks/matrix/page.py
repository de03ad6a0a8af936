"""Writers of the support matrix for docs/support.md, as lines of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from benchmarks.markdown import paragraph, table

Document = Mapping[str, Any]

LAYOUTS = {
    "single": "one process",
    "ddp": "DistributedDataParallel",
    "ddp-static": "DistributedDataParallel, static_graph",
    "fsdp1": "FullyShardedDataParallel (FSDP1, use_orig_params)",
    "fsdp2": "fully_shard (FSDP2)",
    "fsdp2-mixed": "FSDP2, bf16 mixed precision",
    "hsdp": "FSDP2 on a 2 x 2 mesh (HSDP)",
    "tp": "tensor parallel",
    "fsdp2-tp": "FSDP2 + tensor parallel, 2 x 2",
    "tp-sequence": "tensor parallel, activations sharded over the sequence",
    "pp-gpipe": "pipeline, 2 stages, GPipe",
    "pp-1f1b": "pipeline, 2 stages, 1F1B",
}
VARIATIONS = (
    ("", "plain"),
    ("block", "compiled block by block"),
    ("whole", "compiled whole"),
    ("fullgraph", "compiled whole, fullgraph"),
    ("reentrant-outside", "reentrant checkpoint around blocks"),
    ("reentrant-inside", "reentrant checkpoint inside blocks"),
    ("outside", "checkpoint around blocks"),
    ("inside", "checkpoint inside blocks"),
    ("no_sync", "2 microbatches, no_sync"),
    ("bf16", "bf16 autocast"),
    ("scaler", "fp16 autocast, GradScaler"),
)
MARKS = {
    "proven": "proven",
    "untested": "untested",
    "refused": "refused",
    "not in torch": "torch fails",
    "wrong": "WRONG",
}
NOT_TRIED = "not run"


def matrix(told: Document) -> list[str]:
    """Write a table of single variations, a table of pairs, and every message of koopmon or torch."""
    rows: Sequence[Mapping[str, Any]] = told["cells"]
    by_name = {row["name"]: row for row in rows}
    heading = ["", *(LAYOUTS[layout] for layout in LAYOUTS)]
    single = []
    for part, label in VARIATIONS:
        names = [f"{layout}/{part}" if part else layout for layout in LAYOUTS]
        single.append([label, *(_mark(by_name.get(name), name) for name in names)])
    pairs = [row for row in rows if row["why"] == "pair"]
    counts, machine, versions = told["counts"], told["provenance"]["machine"], told["provenance"]["versions"]
    lines = [
        f"{counts['proven']} cells proven, {counts['untested']} untested, {counts['refused']} refused,"
        f" {counts['wrong']} wrong; {counts['not in torch']} that torch {versions['torch']} itself cannot run;"
        f" {told['num_cells'] - len(rows)} of {told['num_cells']} not run yet. {told['minutes']:.1f} minutes in all.",
        f"Device {told['device']}, backend {told['backend']}, {machine['cores']} cores, {told['provenance']['date']}.",
        "",
        *table(heading, single),
        "",
        "Pairs:",
        "",
        *table(["cell", "state"], [[f"`{row['name']}`", _mark(row, row["name"])] for row in pairs]),
        "",
        "Messages, each with the state of its first cell:",
        "",
    ]
    said = sorted({_said(row) for row in rows if _said(row)[1]})
    for line, group in groupby(sorted(said, key=lambda each: each[1]), key=lambda each: each[1]):
        lines.append(f"- {next(iter(group))[0]}: {line}")
    return lines


def _mark(row: Mapping[str, Any] | None, name: str) -> str:
    if row is None:
        return "-" if name.startswith("pp-") and name.endswith("no_sync") else NOT_TRIED
    return MARKS[row["state"]] + (", KSS refused" if row.get("kss_refused") else "")


def _said(row: Mapping[str, Any]) -> tuple[str, str]:
    return MARKS[row["state"]], (row["line"] or row.get("kss_refused", "")).replace("|", "/").replace("<", "&lt;")


def endurance(told: Document) -> list[str]:
    """Write the memory of one long training, and its load."""
    resident, tensors = told["rss_bytes"], told["tensors"]
    megabytes = (max(resident) - resident[0]) / (1 << 20)
    grown = f"{megabytes:.1f} MB at most, from {tensors[0]} live tensors to {tensors[-1]}"
    parts = [
        f"The training took {told['steps']:,} steps in {told['seconds'] / 60.0:.1f} minutes with a snapshot at each",
        f"({told['sent']:,} sent, {told['dropped']:,} dropped), with KSS and a back-off in force. After the",
        f"first quarter the process grew by {grown}, with {told['errors']} errors of the agent.",
    ]
    return paragraph(parts)


WRITERS = {"matrix": matrix, "endurance": endurance}
