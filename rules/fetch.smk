# Downloads of backbones and data sets: local rules, since they need the network. They retry by themselves, so the rules have no
# `retries`.
localrules:
    fetch_backbone,
    fetch_dataset,


rule fetch_backbone:
    output:
        manifest="resources/backbones/{backbone}/manifest.json",
    log:
        "logs/fetch/backbone-{backbone}.log",
    resources:
        **light(memory_gb=4, minutes=240),
    params:
        spec=lambda wildcards: PLAN.source_spec(PLAN.backbones[wildcards.backbone]),
    message:
        "Fetching the backbone {wildcards.backbone}"
    script:
        "../workflow/scripts/fetch.py"


rule fetch_dataset:
    input:
        lambda wildcards: PLAN.source_inputs(wildcards.dataset),
    output:
        manifest="resources/datasets/{dataset}/manifest.json",
    log:
        "logs/fetch/dataset-{dataset}.log",
    resources:
        **light(memory_gb=4, minutes=600),
    params:
        spec=lambda wildcards: PLAN.source_spec(PLAN.datasets[wildcards.dataset]),
    message:
        "Fetching the data set {wildcards.dataset}"
    script:
        "../workflow/scripts/fetch.py"
