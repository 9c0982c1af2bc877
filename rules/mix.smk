# Verifying records and images, and writing them as one mixture.
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


# Contamination: images of the benchmarks that are also trained on.
rule check_contamination:
    input:
        mixture="resources/mixtures/{mixture}/manifest.json",
        benchmarks=lambda wildcards: PLAN.prepared_benchmarks(wildcards.smoke),
    output:
        report="results/{smoke}overlap/{mixture}.json",
    log:
        "logs/{smoke}overlap/{mixture}.log",
    resources:
        **light(memory_gb=4, minutes=60),
    message:
        "Checking {wildcards.mixture} for images of the benchmarks"
    script:
        "../workflow/scripts/check_contamination.py"


# A mixture encoded with one model's tokenizer and one chat template, shared by all stages that use the same encoding.
rule tokenise:
    input:
        unpack(lambda wildcards: {role: str(path) for role, path in wanted_tokens(wildcards).inputs().items()}),
    output:
        shards=directory("resources/tokens/{mixture}/{key}/shards"),
        report="resources/tokens/{mixture}/{key}/report.json",
        manifest="resources/tokens/{mixture}/{key}/manifest.json",
    log:
        "logs/tokens/{mixture}-{key}.log",
    wildcard_constraints:
        key="[0-9a-f]{12}",
    threads: 2
    resources:
        **light(memory_gb=8, minutes=240),
    params:
        spec=lambda wildcards: wanted_tokens(wildcards).spec(),
    message:
        "Tokenising {wildcards.mixture}"
    script:
        "../workflow/scripts/tokenise.py"
