"""The commands. A new one is a row here, with functions beside it."""

from assay.cli import ab, admission, agents, campaigns, exports, history, judging, plans, prompts, proofs, shown, tasks

COMMANDS = {
    command.name: command
    for command in (
        tasks.TASK,
        admission.ADMIT,
        judging.JUDGE,
        judging.PREPARE,
        prompts.PROMPT,
        agents.AGENT,
        campaigns.RUN,
        exports.EXPORT,
        plans.MEASURE,
        plans.DECIDE,
        shown.LEDGER,
        ab.AB,
        history.HISTORY,
        shown.REPLAY,
        shown.REPORT,
        shown.SCHEMA,
        proofs.DOCTOR,
        proofs.SIMULATE,
        proofs.SELFTEST,
    )
}
