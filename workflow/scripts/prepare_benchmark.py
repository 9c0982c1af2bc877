from mmpipe.jobs import prepare_benchmark

prepare_benchmark(snakemake)  # noqa: F821 - provided by Snakemake
