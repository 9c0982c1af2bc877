localrules:
    gather_annotations,


# One rule a kind of stage. A stage's result depends on its spec and its inputs' manifests, nothing else; its progress lives in
# results/{recipe}/{stage}/state/, which Snakemake does not know and therefore does not delete.
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


# What a teacher or a reference model says about a mixture, written down once for any number of students: in chunks that find what an
# earlier job finished in {mixture}/state/, which Snakemake does not know, then published as one.
rule annotate:
    input:
        unpack(annotation_inputs),
    output:
        temp("resources/{smoke}teacher/{annotator}/{mixture}/chunks/{key}/{chunk}.json"),
    log:
        "logs/{smoke}teacher/{annotator}/{mixture}-{key}-{chunk}.log",
    wildcard_constraints:
        annotator=r"[^/]+@[a-z0-9_]+",
        key="[0-9a-f]{12}",
    threads: lambda wildcards: annotation_hardware(wildcards).cpus
    resources:
        **resources_of(annotation_hardware),
    params:
        spec=lambda wildcards: PLAN.annotation_spec(asked_annotation(wildcards)),
    message:
        "{wildcards.annotator} writes down what it says about {wildcards.mixture} ({wildcards.chunk})"
    script:
        "../workflow/scripts/annotate.py"


rule gather_annotations:
    input:
        unpack(annotation_inputs),
        chunks=lambda wildcards: PLAN.annotation_chunks(asked_annotation(wildcards), out(wildcards)),
    output:
        shards=directory("resources/{smoke}teacher/{annotator}/{mixture}/{key}/shards"),
        manifest="resources/{smoke}teacher/{annotator}/{mixture}/{key}/manifest.json",
    log:
        "logs/{smoke}teacher/{annotator}/{mixture}-{key}.log",
    wildcard_constraints:
        annotator=r"[^/]+@[a-z0-9_]+",
        key="[0-9a-f]{12}",
    resources:
        **light(memory_gb=2, minutes=60),
    params:
        spec=lambda wildcards: PLAN.annotation_spec(asked_annotation(wildcards)),
    message:
        "Gathering what {wildcards.annotator} wrote down about {wildcards.mixture}"
    script:
        "../workflow/scripts/gather_annotations.py"
