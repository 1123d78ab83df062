"""The commands. A new one is a row here, with functions beside it."""

from assay.cli import ab, admission, judging, plans, proofs, shown, tasks

COMMANDS = {
    command.name: command
    for command in (
        tasks.TASK,
        admission.ADMIT,
        judging.JUDGE,
        judging.PREPARE,
        plans.MEASURE,
        plans.DECIDE,
        shown.LEDGER,
        ab.AB,
        shown.REPLAY,
        shown.REPORT,
        shown.SCHEMA,
        proofs.DOCTOR,
        proofs.SIMULATE,
        proofs.SELFTEST,
    )
}
