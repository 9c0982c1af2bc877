from mmpipe.jobs import gather_experts

gather_experts(snakemake)  # noqa: F821 - provided by Snakemake
