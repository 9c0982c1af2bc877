# Names for parts of the whole: `snakemake finetuned` makes every fine-tuned checkpoint the chosen recipes need.
localrules:
    pretrained,
    prefinetuned,
    finetuned,
    distilled,
    preferred,
    sparsified,
    answers,
    scores,
    submissions,
    report_items,


rule pretrained:
    """Projectors."""
    input:
        trained("pretrain"),


rule prefinetuned:
    """Dense models of which every part was trained."""
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
    """Models that drop part of their context."""
    input:
        trained("sparsify"),


rule answers:
    """Answers to every chosen benchmark."""
    input:
        PLAN.per_checkpoint("answers.jsonl"),


rule scores:
    """Scores of every chosen benchmark."""
    input:
        PLAN.per_checkpoint("score.json"),


rule submissions:
    """Files for the benchmark servers."""
    input:
        PLAN.submissions(),


rule report_items:
    """Figures, tables and samples of the report."""
    input:
        PLAN.report_items(),
