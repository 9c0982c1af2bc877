from mmpipe.workflow import prepare_benchmark

prepare_benchmark(snakemake)  # noqa: F821 - provided by Snakemake
