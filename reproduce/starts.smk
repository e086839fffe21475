# Which start of A? Eight embedded tasks, every start, three seeds; λ chosen on held-out data.
#
#   pip install '.[reproduce]'
#   snakemake --snakefile reproduce/starts.smk --cores 2
#
# Interrupted, the same command goes on. The result is .save_dir/starts/report.md.

OUT = ".save_dir/starts"
SEEDS = [42, 43, 44]
ARMS = {
    "gaussian": "--init gaussian",
    "gaussian-norm1": "--init gaussian --norm-match 1",
    "orthogonal": "--init orthogonal",
    "analytical-token": "--init analytical --features token",
    "analytical-sample": "--init analytical --features sample",
    "analytical-mean": "--init analytical --features mean",
    "contrastive": "--init contrastive",
}
COMMON = (
    "--backbone minilm --dtype bfloat16 --lr 2e-3 --epochs 2 --per-device-train-bsz 16"
    " --max-seq-len 64 --max-train-samples 768 --max-eval-samples 128 --max-test-samples 256"
)


rule all:
    input:
        expand(OUT + "/{arm}/{seed}/load_model_path.json", arm=ARMS, seed=SEEDS),


rule train:
    output:
        OUT + "/{arm}/{seed}/load_model_path.json",
    log:
        OUT + "/{arm}/{seed}/train.log",
    params:
        directory=OUT + "/{arm}/{seed}",
        arm=lambda wildcards: ARMS[wildcards.arm],
    shell:
        "OMP_NUM_THREADS={threads} python train_glue.py {COMMON} {params.arm}"
        " --seed {wildcards.seed} --output-dir {params.directory} --resume > {log} 2>&1"
        " && cp {params.directory}/load_model_path-*.json {output}"
