# Stages of recipes, and the precomputed outputs of teachers and reference models.
localrules:
    pretrained,
    prefinetuned,
    finetuned,
    distilled,
    preferred,
    sparsified,
    gather_precomputed,


# Target rules: `snakemake finetuned` makes every fine-tuned checkpoint that the chosen recipes need.
rule pretrained:
    """Projectors."""
    input:
        trained("pretrain"),


rule prefinetuned:
    """Pre-finetuned dense models."""
    input:
        trained("prefinetune"),


rule finetuned:
    """Fine-tuned models."""
    input:
        trained("finetune"),


rule distilled:
    """Students distilled from a teacher, dense and sparse."""
    input:
        trained("distill_dense"),
        trained("distill_sparse"),


rule preferred:
    """Preference-tuned models."""
    input:
        trained("prefer"),


rule sparsified:
    """Models that prune their context."""
    input:
        trained("sparsify"),


# One rule for each kind of stage. A result depends on the stage's spec and the manifests of its inputs, nothing else. Progress is
# stored in results/{recipe}/{stage}/state/, which is not a declared output, so that Snakemake does not delete it.
rule pretrain:
    input:
        unpack(stage_inputs),
    output:
        weights="results/{smoke}{recipe}/{stage}/model/projector.safetensors",
        manifest="results/{smoke}{recipe}/{stage}/model/manifest.json",
        history="results/{smoke}{recipe}/{stage}/report/history.jsonl",
    log:
        "logs/{smoke}{recipe}/{stage}.log",
    wildcard_constraints:
        stage=stages_of("pretrain"),
    threads: lambda wildcards: stage_hardware(wildcards).cpus
    resources:
        **resources_of(stage_hardware),
    params:
        spec=stage_spec,
    message:
        "Training {wildcards.recipe}: {wildcards.stage}"
    script:
        "../workflow/scripts/stage.py"


use rule pretrain as finetune with:
    output:
        weights="results/{smoke}{recipe}/{stage}/model/model.safetensors",
        projector="results/{smoke}{recipe}/{stage}/model/projector.safetensors",
        manifest="results/{smoke}{recipe}/{stage}/model/manifest.json",
        history="results/{smoke}{recipe}/{stage}/report/history.jsonl",
    wildcard_constraints:
        stage=stages_of("finetune"),


use rule finetune as prefinetune with:
    wildcard_constraints:
        stage=stages_of("prefinetune"),


use rule finetune as distill_dense with:
    wildcard_constraints:
        stage=stages_of("distill_dense"),


use rule finetune as distill_sparse with:
    wildcard_constraints:
        stage=stages_of("distill_sparse"),


use rule finetune as prefer with:
    wildcard_constraints:
        stage=stages_of("prefer"),


use rule finetune as sparsify with:
    output:
        weights="results/{smoke}{recipe}/{stage}/model/model.safetensors",
        predictors="results/{smoke}{recipe}/{stage}/model/sparsity.safetensors",
        manifest="results/{smoke}{recipe}/{stage}/model/manifest.json",
        history="results/{smoke}{recipe}/{stage}/report/history.jsonl",
    wildcard_constraints:
        stage=stages_of("sparsify"),


use rule pretrain as upcycle with:
    output:
        weights="results/{smoke}{recipe}/{stage}/model/model.safetensors",
        manifest="results/{smoke}{recipe}/{stage}/model/manifest.json",
    wildcard_constraints:
        stage=stages_of("upcycle"),
    message:
        "Up-cycling {wildcards.recipe}: {wildcards.stage}"


use rule upcycle as construct with:
    wildcard_constraints:
        stage=stages_of("construct"),
    message:
        "Constructing {wildcards.recipe}: {wildcards.stage}"


# Teacher logits and reference log-probabilities of a mixture, computed once for any number of students: in chunks that resume from
# {mixture}/state/, which is not a declared output, then published as one.
rule precompute:
    input:
        unpack(precomputation_inputs),
    output:
        temp("resources/{smoke}teacher/{teacher}/{mixture}/chunks/{key}/{chunk}.json"),
    log:
        "logs/{smoke}teacher/{teacher}/{mixture}-{key}-{chunk}.log",
    wildcard_constraints:
        teacher=r"[^/]+@[a-z0-9_]+",
        key="[0-9a-f]{12}",
    threads: lambda wildcards: precomputation_hardware(wildcards).cpus
    resources:
        **resources_of(precomputation_hardware),
    params:
        spec=lambda wildcards: PLAN.precomputation_spec(requested_precomputation(wildcards)),
    message:
        "Precomputing log-probabilities of {wildcards.teacher} on {wildcards.mixture} ({wildcards.chunk})"
    script:
        "../workflow/scripts/precompute.py"


rule gather_precomputed:
    input:
        unpack(precomputation_inputs),
        chunks=lambda wildcards: PLAN.precomputation_chunks(requested_precomputation(wildcards), out(wildcards)),
    output:
        shards=directory("resources/{smoke}teacher/{teacher}/{mixture}/{key}/shards"),
        manifest="resources/{smoke}teacher/{teacher}/{mixture}/{key}/manifest.json",
    log:
        "logs/{smoke}teacher/{teacher}/{mixture}-{key}.log",
    wildcard_constraints:
        teacher=r"[^/]+@[a-z0-9_]+",
        key="[0-9a-f]{12}",
    resources:
        **light(memory_gb=2, minutes=60),
    params:
        spec=lambda wildcards: PLAN.precomputation_spec(requested_precomputation(wildcards)),
    message:
        "Gathering precomputed log-probabilities of {wildcards.teacher} on {wildcards.mixture}"
    script:
        "../workflow/scripts/precompute.py"
