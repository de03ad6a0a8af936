"""Discovery in the text types of transformers, at tiny sizes: `python -m benchmarks.discovered_types`.

Every type of the tables for causal, masked and sequence-to-sequence language models is built with random weights. Types
that cannot be built or run at these sizes are left out. The table lists the refused types with the reason.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import koopmon
from benchmarks.provenance import provenance

RESULT = Path(__file__).parent / "results" / "discovered_types.json"
TABLES = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
}
MAX_PARAMETERS = 60_000_000
WIDTHS = "hidden_size d_model n_embd dim embedding_size word_embed_proj_dim emb_dim n_embed moe_intermediate_size"
WIDTHS += " shared_expert_intermediate_size shared_intermediate_size"
INNER = "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim hidden_dim ffn_hidden_size"
DEPTHS = "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers"
HEADS = "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"
HEADS += " num_key_value_heads num_experts_per_tok moe_topk index_n_heads"
PLACES = "max_position_embeddings n_positions n_ctx max_seq_len context_length"
FOURS = "num_local_experts num_experts n_routed_experts mamba_n_heads"
SIXTEENS = (
    "head_dim d_kv q_lora_rank kv_lora_rank v_head_dim qk_head_dim attention_head_size mamba_d_head sliding_window"
)
SIXTEENS += " index_head_dim"
EIGHTS = "qk_rope_head_dim qk_nope_head_dim rotary_dim state_size num_buckets mamba_d_state mamba_chunk_size index_topk"
ONES = "n_group topk_group bos_token_id decoder_start_token_id first_k_dense_replace mamba_n_groups"
NUM_LAYERS = 4
SIZES: dict[str, Any] = {
    **dict.fromkeys(WIDTHS.split(), 32),
    **dict.fromkeys(INNER.split(), 64),
    **dict.fromkeys(PLACES.split(), 64),
    **dict.fromkeys(DEPTHS.split(), NUM_LAYERS),
    **dict.fromkeys(FOURS.split(), 4),
    **dict.fromkeys(HEADS.split(), 2),
    **dict.fromkeys(SIXTEENS.split(), 16),
    **dict.fromkeys(EIGHTS.split(), 8),
    **dict.fromkeys(ONES.split(), 1),
    "vocab_size": 99,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "use_cache": False,
}


def shrunk(config: Any) -> Any:
    """Set the sizes of `config`, and of the configurations in it, to those of SIZES."""
    for name, size in SIZES.items():
        if hasattr(config, name) and not isinstance(getattr(config, name), (list, dict, tuple)):
            try:
                setattr(config, name, size)
            except (AttributeError, ValueError, NotImplementedError):
                continue  # a property of some types
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, getattr(config, name)[:NUM_LAYERS])
    for name in ("text_config", "encoder", "decoder", "vision_config", "audio_config"):
        if hasattr(inner := getattr(config, name, None), "to_dict"):
            shrunk(inner)
    return config


def look(kind: str, name: str, classes: Any) -> dict[str, Any]:
    """Discover the stack of one type."""
    import transformers

    try:
        config = shrunk(transformers.CONFIG_MAPPING[name]())
        chosen = getattr(transformers, classes if isinstance(classes, str) else classes[0])
        with torch.device("meta"):
            num_parameters = sum(parameter.numel() for parameter in chosen(config).parameters())
        if num_parameters > MAX_PARAMETERS:
            raise ValueError(f"{num_parameters} parameters")
        torch.manual_seed(0)
        model = chosen(config).float().eval()
        tokens = torch.randint(3, 90, (2, 16))
        more: dict[str, Any] = {"decoder_input_ids": torch.randint(3, 90, (2, 12))} if kind == "seq2seq" else {}
        with torch.no_grad():
            model(tokens, **more)
    except Exception as error:  # whatever a type does at such sizes
        return {"outcome": "not built", "why": f"{type(error).__name__}: {error}"[:200]}
    try:
        stack = koopmon.discover(model, tokens, **more).stack
    except koopmon.KoopmonError as error:
        return {"outcome": "refused", "why": str(error)[:400]}
    return {"outcome": "discovered", "stack": stack.name, "form": stack.form, "layers": stack.num_layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="names of types; all without any")
    wanted = parser.parse_args().types
    from transformers.models.auto import modeling_auto

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    console = Console()
    listed = [
        (kind, name, classes)
        for kind, table in TABLES.items()
        for name, classes in dict(getattr(modeling_auto, table)._model_mapping).items()
        if not wanted or name in wanted
    ]
    found = {
        f"{kind}/{name}": look(kind, name, classes) for kind, name, classes in track(listed, "types", console=console)
    }
    counts = Counter(each["outcome"] for each in found.values())
    table = Table("type", "reason", title=f"{counts['discovered']} discovered, {counts['refused']} refused")
    for name, each in found.items():
        if each["outcome"] == "refused":
            table.add_row(name, each["why"])
    console.print(table)
    if not wanted:
        RESULT.write_text(json.dumps({**provenance(seed=0), "counts": counts, "types": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
