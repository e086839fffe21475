"""Settings of the two scripts: one field a flag, checked before any long work."""

from __future__ import annotations

from dataclasses import dataclass

from osrm.checks import LARGEST, Check, number, whole
from osrm.flags import check, flag

MINI_GLUE = "mini-glue"  # the --data-dir of the embedded data
EPSILON = 1e-2  # of the contrastive start; docs/short-training.md, "Epsilon", has the measurement

POSITIVE = number(0, low_open=True)
NOT_NEGATIVE = Check("a finite number of at least 0, below 2^63", lambda x: 0 <= x <= LARGEST)
BELOW_1 = Check("a share of at least 0 and below 1", lambda share: 0 <= share < 1)
COUNT = Check("at least 1, or -1 for all", lambda count: count != 0 and abs(count) <= LARGEST)


@dataclass(frozen=True)
class TrainConfig:
    """The flags of train_glue.py, with the published release's names and defaults."""

    backbone: str = flag(
        "roberta-large",
        "roberta-large, t5-large, llama3.2-1b, llama3.2-3b, llama3-8b, the embedded minilm, mpnet"
        " and smollm2, or a path or hub id of a RoBERTa, BERT, MPNet, DistilBERT, T5 or"
        " Llama-family model",
    )
    tasks: list[str] = flag(
        [], "the tasks to train, one after the other (default: all of the data)"
    )
    other_tasks: list[str] = flag(
        [], "the tasks whose features A avoids (default: all in the data and the feature bank)"
    )
    init: str = flag(
        "gaussian",
        "start of A: gaussian or kaiming (of PEFT), orthogonal, analytical (OSRM: least energy of"
        " the other tasks' features), contrastive (most own energy against theirs), release (the"
        " published code's; add --features mean --count-padding)",
        ("gaussian", "kaiming", "orthogonal", "analytical", "contrastive", "release"),
    )
    epsilon: float = flag(
        EPSILON,
        "for contrastive and nullify: energy below this share of the mean eigenvalue is small",
        POSITIVE,
    )
    norm_match: float | None = flag(
        None, "rescale every row of A to this norm", POSITIVE, type=float
    )
    shift_penalty: float = flag(
        0.0,
        "add to the loss X times how far the update shifts the outputs for the other tasks'"
        " features, relative to the own ones",
        NOT_NEGATIVE,
    )
    features: str = flag(
        "token",
        "the feature vectors: every token, the mean of each sample, or the mean of the task",
        ("token", "sample", "mean"),
    )
    count_padding: bool = flag(False, "padding counts as a feature too, as in the release")
    feature_bank: str | None = flag(
        None,
        "folder of feature statistics, <task>.safetensors: files in it are used, missing ones are"
        " written",
        metavar="DIR",
    )
    only_features: bool = flag(False, "write the feature bank and stop")
    max_num_samples: int = flag(
        100, "training examples per task for the features; <= 0: all", whole()
    )
    rank: int = flag(8, "rank r of the adapters", whole(1))
    alpha: int = flag(16, "LoRA's alpha: an update is alpha/r B A", whole(1))
    freeze: str = flag("N", "keep A or B as it starts; N trains both", metavar="{A,B,N}")
    block: str = flag("qv", "the projections that get adapters: letters of q, k and v")
    load_model_path: str | None = flag(
        None, "JSON {task: checkpoint}: transform these, do not train", metavar="FILE"
    )
    transform: str = flag(
        "nullify",
        "nullify: filter A by the tasks' features; project (the paper's): keep the A of --init and"
        " fit B",
        ("nullify", "project"),
    )
    kappa: float = flag(
        0.3, "nullify: weight of the other tasks' features against the own", NOT_NEGATIVE
    )
    epochs: int = flag(10, "epochs of every task", whole(1))
    load_epochs: str | None = flag(None, "JSON {task: epochs}, instead of --epochs", metavar="FILE")
    lr: float = flag(4e-4, "peak learning rate of every task", POSITIVE)
    load_lrs: str | None = flag(None, "JSON {task: rate}, instead of --lr", metavar="FILE")
    lr_scheduler: str = flag(
        "linear", "learning rate schedule", ("linear", "constant", "constant_with_warmup")
    )
    warmup_ratio: float = flag(0.06, "share of the steps in which the rate warms up", BELOW_1)
    weight_decay: float = flag(0.0, "weight decay of AdamW", NOT_NEGATIVE)
    per_device_train_bsz: int = flag(64, "training batch size of a device", whole(1))
    per_device_eval_bsz: int = flag(64, "evaluation batch size of a device", whole(1))
    grad_accumlate_steps: int = flag(
        1, "batches that make one step", whole(1), aliases=["--grad-accumulate-steps"]
    )
    gradient_checkpoint: bool = flag(False, "recompute activations in the backward pass")
    max_train_samples: int = flag(105000, "training examples of a task; < 0: all", COUNT)
    max_eval_samples: int = flag(15000, "examples that select the epoch; < 0: all", COUNT)
    max_test_samples: int = flag(-1, "reported validation examples; < 0: all", COUNT)
    select_on: str = flag(
        "held-out",
        "what selects the best epoch: the data's split 'selection' (without it 10 %% of the"
        " training data, which no step sees), or (as in the release) the validation split that is"
        " reported",
        ("held-out", "validation"),
    )
    not_load_best_model_at_end: bool = flag(False, "keep the last epoch instead of the best")
    max_seq_len: int = flag(128, "tokens of an example; a longer one loses its start", whole(8))
    dtype: str = flag(
        "auto",
        "precision of the frozen weights; auto: bfloat16 on a GPU that has it, else float32",
        ("auto", "float32", "bfloat16"),
    )
    data_dir: str | None = flag(
        None,
        "DIR with <task>/{train,validation}.{parquet,jsonl,csv,tsv}, perhaps selection too, and"
        " tasks.json if its tasks are not GLUE's; or embedded: mini-glue (the default of the"
        " embedded models) or mini-16; without it GLUE from the hub or its local cache",
        metavar="DIR",
    )
    output_dir: str = flag(".save_dir", "folder for the run directories")
    save_merged_model: bool = flag(False, "write the dense model too, to merged_model/")
    report_to: str = flag("none", "loggers of the Trainer: tensorboard, wandb, ...")
    resume: bool = flag(False, "skip finished tasks and continue interrupted ones")
    seed: int = flag(42, "seed of every random choice", whole(0))

    def __post_init__(self) -> None:
        problems = []
        if not self.block or set(self.block) - set("qkv") or len(set(self.block)) < len(self.block):
            problems.append(f"--block {self.block}: expected letters of q, k and v, each once")
        if self.freeze not in ("A", "B", "N"):
            both = set(self.freeze) == set("AB")
            reason = "A and B both frozen leave nothing to train" if both else "unknown"
            problems.append(f"--freeze {self.freeze}: {reason}; expected A, B or N")
        if self.only_features and not self.feature_bank:
            problems.append("--only-features writes a bank; name its folder with --feature-bank")
        if self.shift_penalty and self.load_model_path:
            problems.append(
                "--shift-penalty acts in training, and --load-model-path trains nothing"
            )
        check(self, problems)


@dataclass(frozen=True)
class MergeConfig:
    """The flags of merge.py. Settings that are not given come from the runs' own args.json."""

    load_model_path: str = flag(
        "load_model_path.json",
        "JSON {task: directory}: runs of train_glue.py, PEFT LoRA adapters, or dense checkpoints",
        metavar="FILE",
    )
    methods: list[str] = flag([], "the merging methods; all, or none given: those in --hparams")
    from_recipe: str | None = flag(
        None, "repeat the merge of this recipe.json", aliases=["--from"], metavar="FILE"
    )
    hparams: str = flag("hparams/merge.json", "JSON {method: {knob: value}}", metavar="FILE")
    scale: float | None = flag(None, "λ of every method that has one", type=float)
    search: list[float] = flag(
        [],
        "take the λ of these with the best average score on examples held out of the training data;"
        " go on beyond the smallest or largest while it is the best",
        POSITIVE,
        type=float,
    )
    search_density: list[float] = flag(
        [],
        "with --search: choose the density of these, too",
        number(0, 1, low_open=True),
        type=float,
    )
    density: float | None = flag(None, "share of the entries that TIES keeps", type=float)
    trim: str | None = flag(
        None,
        "TIES has one threshold per task (global), or per layer (tensor)",
        ("global", "tensor"),
    )
    weights: list[str] = flag(
        [],
        "weights of tasks in all methods but emr, below 0 to forget one; the other tasks have 1",
        metavar="TASK=X",
    )
    dtype: str = flag("float32", "precision of the merges", ("float32", "float64"))
    max_num_samples: int = flag(256, "training examples per task for RegMean and Fisher", whole(1))
    align_heads: int | None = flag(
        None,
        "fit each task's head to its features in the merged model, by N of its training texts;"
        " their labels are not used",
        whole(2),
        type=int,
    )
    count_padding: bool = flag(False, "RegMean counts padding as text, as the release does")
    export: list[str] = flag([], "also write PEFT adapters, or whole models", ("adapter", "model"))
    rank: int | None = flag(None, "limits the rank of exported adapters", whole(1), type=int)
    diagnose: bool = flag(False, "measure how far adapters and merges shift each task's outputs")
    output_dir: str = flag(".save_dir/merged", "folder for the merged models and results")
    overwrite: bool = flag(False, "replace an output directory of an earlier merge")
    no_eval: bool = flag(False, "only merge and save; then any task names will do")
    backbone: str | None = flag(None, "the base model, instead of the one the adapters name")
    data_dir: str | None = flag(None, "the data to evaluate on, instead of the runs' own")
    eval_text: str | None = flag(
        None,
        'score language models by the loss of texts: DIR has <task>.jsonl, with {"text": ...} or'
        ' {"prompt": ..., "completion": ...} a line; --search holds out every second line',
        metavar="DIR",
    )
    max_test_samples: int | None = flag(None, "reported examples; < 0: all", COUNT, type=int)
    per_device_eval_bsz: int = flag(64, "evaluation batch size of a device", whole(1))
    device: str = flag(
        "auto", "what merges and scores; auto: a GPU if there is one", ("auto", "cpu", "cuda")
    )
    eval_dtype: str = flag("float32", "precision of the model in scoring", ("float32", "bfloat16"))

    def __post_init__(self) -> None:
        problems = []
        given = {
            name.replace("_", "-")
            for name, value in vars(self).items()
            if value is not False and value not in (None, [])
        }
        if "search-density" in given and "search" not in given:
            problems.append("--search-density needs --search, the grid of λ; give both")
        both = ("search", "scale"), ("search-density", "density")
        text = [("eval-text", name) for name in ("data-dir", "align-heads")]
        no_eval = [(name, "no-eval") for name in ("search", "diagnose", "eval-text", "align-heads")]
        for one, other in (*both, *text, *no_eval):
            if given >= {one, other}:
                problems.append(f"--{one} and --{other} contradict each other; give one of them")
        if "rank" in given and "adapter" not in self.export:
            problems.append(f"--rank {self.rank}: only --export adapter has a rank; add it")
        fixed = ("methods", "search", "weights", "scale", "density", "trim")
        if self.from_recipe and (wrong := [f"--{name}" for name in fixed if name in given]):
            problems.append(f"--from repeats a recipe as it is: leave {', '.join(wrong)} out")
        check(self, problems)

    @property
    def glue(self) -> bool:
        """Whether the tasks are scored on labelled data, by GLUE's metrics."""
        return not (self.no_eval or self.eval_text)
