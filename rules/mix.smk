# Verifying records and pictures, and writing them as one mixture.
rule mix_data:
    input:
        lambda wildcards: PLAN.mixture_inputs(wildcards.mixture),
    output:
        records="resources/mixtures/{mixture}/records.arrow",
        report="resources/mixtures/{mixture}/report.json",
        manifest="resources/mixtures/{mixture}/manifest.json",
    log:
        "logs/mix/{mixture}.log",
    threads: 2
    resources:
        **light(memory_gb=8, minutes=240),
    params:
        spec=lambda wildcards: PLAN.mixture_spec(wildcards.mixture),
    message:
        "Verifying and mixing the data of {wildcards.mixture}"
    script:
        "../workflow/scripts/mix.py"
