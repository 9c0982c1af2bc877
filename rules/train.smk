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
