# Which start of A, and which transform? Eight embedded tasks, three seeds, λ from held-out data.
#
#   pip install '.[reproduce]'
#   snakemake --snakefile reproduce/starts.smk --cores 2
#
# About three and a half hours on two CPU cores; interrupted, the same command goes on. The result is
# .save_dir/starts/report/{table.md,results.json,plot.png}.

OUT = ".save_dir/starts"
SEEDS = [42, 43, 44]
MODEL = "--backbone minilm --max-seq-len 64 --max-train-samples 768 --max-eval-samples 128 --max-test-samples 256"
TRAINING = "--dtype bfloat16 --lr 2e-3 --epochs 2 --per-device-train-bsz 16"
STARTS = {
    "gaussian": "--init gaussian",
    "gaussian-norm1": "--init gaussian --norm-match 1",
    "orthogonal": "--init orthogonal",
    "analytical-token": "--init analytical --features token",
    "analytical-sample": "--init analytical --features sample",
    "analytical-mean": "--init analytical --features mean",
    "contrastive": "--init contrastive",
}
# Adapters from the gaussian start, moved after their training.
TRANSFORMS = {
    "gaussian-nullify0.3": "--transform nullify --kappa 0.3",
    "gaussian-project": "--transform project --init analytical",
}
# Once each: other κ, other ε.
MORE_TRANSFORMS = {
    "gaussian-nullify1": "--transform nullify --kappa 1",
    "gaussian-nullify3": "--transform nullify --kappa 3",
}
CONTROLS = {
    "contrastive-eps1e-1": "--init contrastive --epsilon 1e-1",
}
MOVED = TRANSFORMS | MORE_TRANSFORMS
FLAGS = STARTS | MOVED | CONTROLS
ARMS = [*FLAGS]
RUNS = [f"{arm}/{seed}" for seed in SEEDS for arm in STARTS | TRANSFORMS]
RUNS += [f"{arm}/{SEEDS[0]}" for arm in MORE_TRANSFORMS | CONTROLS]


wildcard_constraints:
    arm="[^/]+",
    seed=r"\d+",


rule report:
    input:
        expand(OUT + "/{run}/merged/results.json", run=RUNS),
    output:
        OUT + "/report/table.md",
    shell:
        "python reproduce/starts.py {OUT} {ARMS} --output-dir {OUT}/report"


rule train:
    input:
        lambda wildcards: [OUT + "/gaussian/{seed}/load_model_path.json"] * (wildcards.arm in MOVED),
    output:
        OUT + "/{arm}/{seed}/load_model_path.json",
    log:
        OUT + "/{arm}/{seed}/train.log",
    params:
        directory=OUT + "/{arm}/{seed}",
        flags=lambda wildcards: FLAGS[wildcards.arm],
        how=lambda wildcards, input: f"--load-model-path {input}" if input else TRAINING,
    shell:
        "OMP_NUM_THREADS={threads} python train_glue.py {MODEL} {params.flags}"
        " {params.how} --seed {wildcards.seed} --output-dir {params.directory} --resume > {log} 2>&1"
        " && cp {params.directory}/load_model_path-*.json {output}"


rule merge:
    input:
        OUT + "/{arm}/{seed}/load_model_path.json",
    output:
        OUT + "/{arm}/{seed}/merged/results.json",
    log:
        OUT + "/{arm}/{seed}/merge.log",
    params:
        directory=OUT + "/{arm}/{seed}/merged",
    shell:
        "OMP_NUM_THREADS={threads} python merge.py --load-model-path {input} --diagnose"
        " --methods task_arithmetic ties emr --search 0.2 0.4 0.7 1 1.5"
        " --output-dir {params.directory} --overwrite > {log} 2>&1"
