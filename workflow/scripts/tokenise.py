"""Encode a mixture with one model's tokenizer and chat template."""

from pathlib import Path
from typing import Any

from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import staged_directory
from mmpipe.jobs import failed_report, log, mock_snakemake, offline_job, unchanged
from mmpipe.plan.plan import Plan


@offline_job
def main(snakemake: Any, plan: Plan) -> None:
    from mmpipe.checkpoints.load import language_positions, load_tokenizer
    from mmpipe.data.templates import get_template
    from mmpipe.data.tokens import TextEncoder, tokenise
    from mmpipe.models.llava import IMAGE_TOKEN

    wildcards = snakemake.wildcards
    wanted = plan.tokens[f"{wildcards.mixture}/{wildcards.key}"]
    spec = unchanged(snakemake, wanted.spec())
    inputs = wanted.inputs()
    tokenizer, image_tokens = load_tokenizer(wanted.directories, wanted.vision_language, wanted.layouts)
    encoder = TextEncoder(
        template=get_template(wanted.encoding.template, tokenizer),
        tokenizer=tokenizer,
        image_token=IMAGE_TOKEN,
        tokens_per_image=image_tokens,
        max_length=wanted.encoding.max_length,
        max_positions=language_positions(wanted.directories),
    )
    with staged_directory(Path(snakemake.output.manifest).parent) as staged:
        report = tokenise(
            inputs["mixture"].parent / "records.arrow",
            encoder,
            staged,
            max_bad=plan.mixtures[wildcards.mixture].max_bad,
            workers=snakemake.threads,
            log=log.info,
            failed_report=failed_report(snakemake),
        )
        hashes = manifest.input_hashes(list(inputs.values()))
        manifest.write(staged, kind="tokens", spec=spec, inputs=hashes, records=report["kept"])


if __name__ == "__main__":
    main(globals().get("snakemake") or mock_snakemake("tokenise", mixture="shapes-finetune", key="1cd5cf41db9e"))
