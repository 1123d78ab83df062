"""What can be said of a task without running anything: reverts, code that goes with its tests, scripts that miss."""

from collections.abc import Iterator
from pathlib import Path

from assay.admission import leak
from assay.admission.named import Tree, defines, function_of, module_called, reached
from assay.contract.admission import Leak, Reason
from assay.mining import history, reverts
from assay.mining import script as scripts
from assay.mining.find import FIGURE, line_around
from assay.mining.prompt import Piece, Prompt
from assay.mining.script import Script
from assay.repository.lines import Lines


def of_commit(repository: Path, commit: str) -> Iterator[Reason]:
    """What a reference commit's words and lines say of it."""
    one = history.commit(repository, commit)
    source = f"commit {one.name}"
    signs = reverts.found(repository, one)
    for sign in signs:
        yield Reason("revert", "static", "against", f"the reference is a revert: {sign.words}", source)
    yield from of_lines(history.lines(repository, one.parent, one.name), source, silent=bool(signs))
    text = f"{one.subject}\n{one.body}"
    claims = list(dict.fromkeys(line_around(text, match.start()) for match in FIGURE.finditer(text)))
    for words in claims[:3]:
        yield Reason("claim", "declared", "noted", words, source)


def of_lines(changed: dict[str, Lines], source: str, *, silent: bool = False) -> Iterator[Reason]:
    """What a reference's lines say of it; `silent` where it is already known to be a revert."""
    if words := reverts.takes_away(changed):
        yield Reason("removal", "static", "against", f"the reference takes code away: {words}", source)
    elif not silent:
        yield Reason("revert", "static", "for", "the reference takes back nothing that is known", source)


def of_prompt(prompt: Prompt, repository: Path | None = None, commit: str = "") -> tuple[list[Reason], Leak]:
    """What a rendered prompt says against itself, with the repository's history if that is given.

    GitError for a commit that is not there.
    """
    name = prompt.file.name
    text = prompt.file.read_text(errors="replace")
    found: list[Reason] = []
    tree = None
    if repository is not None:
        one = history.commit(repository, commit)
        tree = Tree(repository, one.parent)
        found += of_commit(repository, one.name)
        given = leak.audit(text, leak.Reference.of_commit(repository, one.name))
    else:
        found += _by_itself(prompt)
        given = leak.of_prompt(prompt, text)
    for piece in prompt.of("script"):
        script = scripts.read(piece.text, piece.first)
        found += _script(prompt, piece, script, tree)
    if not prompt.of("script"):
        found.append(Reason("script", "static", "open", "the prompt has no script", f"{name}:1"))
    found += [Reason("prompt", "static", "noted", piece.text, f"{name}:{piece.first}") for piece in prompt.wrong]
    found.append(Reason("leak", "static", "noted", leak.words(given), name))
    return found, given


def leaked(given: Leak, most: str, source: str) -> Reason:
    """A prompt's level, against the highest that is allowed."""
    if given.level > most:
        return Reason("leak", "static", "against", f"{leak.words(given)}; {most} is allowed", source)
    return Reason("leak", "static", "noted", leak.words(given), source)


def _by_itself(prompt: Prompt) -> Iterator[Reason]:
    """What the prompt's own parts say of a reference that is not given."""
    for piece in prompt.of("message"):
        first = piece.text.strip().split("\n")[0]
        if reverts.says(first, piece.text):
            words = f"the message that it shows is a revert's: {first}"
            yield Reason("revert", "static", "against", words, f"{prompt.file.name}:{piece.first}")
    if words := reverts.removal(prompt.sizes):
        piece = prompt.of("statistics")[0]
        source = f"{prompt.file.name}:{piece.first}-{piece.last}"
        yield Reason("removal", "static", "against", f"the reference takes code away: {words}", source)


def _script(prompt: Prompt, piece: Piece, script: Script, tree: Tree | None) -> Iterator[Reason]:
    name = prompt.file.name
    if script.problem:
        yield Reason("script", "static", "against", f"it is no Python: {script.problem}", f"{name}:{script.line}")
        return
    yield from _modules_called(prompt, script, tree)
    if tree is not None:
        for call in script.calls:
            if function := function_of(tree, script, call):
                path, one = function
                if wrong := scripts.swapped(call, one):
                    order = ", ".join(each.name for each in one.parameters)
                    words = f"{call.name} of {path} takes ({order}): {'; '.join(wrong)}"
                    yield Reason("arguments", "static", "against", words, f"{name}:{call.line}")
    yield _reach(prompt, piece, script, tree)


def _modules_called(prompt: Prompt, script: Script, tree: Tree | None) -> Iterator[Reason]:
    """Names that are called and are modules."""
    called = {call.name: call.line for call in reversed(script.calls)}
    for one in script.imports:
        if one.bound not in called or not one.name:
            continue
        if tree is not None:
            file = module_called(tree, one)
            known = f"{one.module} binds no {one.name}"
        else:
            file = scripts.submodule(one, prompt.targets)
            known = "a target says so; whether its package binds a function of that name is not shown"
        if file:
            words = f"it calls {one.bound}, which is the module {file}: {known}"
            yield Reason("script", "static", "against", words, f"{prompt.file.name}:{called[one.bound]}")


def _reach(prompt: Prompt, piece: Piece, script: Script, tree: Tree | None) -> Reason:
    """Whether the script's calls could lead to a target at all."""
    source = f"{prompt.file.name}:{piece.first}-{piece.last}"
    targets = [path for path in prompt.targets if history.is_source(path)]
    calls = ", ".join(dict.fromkeys(call.name for call in script.calls if _of_targets(script, call.name, targets)))
    if tree is not None:
        files, names = reached(tree, script)
        hit = [path for path in targets if path in files or (_compiled(path) and defines(tree.text(path), names))]
        if hit:
            words = f"names lead from the script to {', '.join(hit)}; whether they run is for a measurement"
            return Reason("reach", "static", "open", words, source)
        words = (
            f"no name leads from what the script calls ({calls}) to any of the {len(targets)} targets that are sources"
        )
        return Reason("reach", "static", "against", words, source)
    meant = [path for one in script.imports for path in scripts.meant(one, targets)]
    if meant:
        return Reason("reach", "static", "open", f"it imports {', '.join(dict.fromkeys(meant))}", source)
    near = [path for path in targets if any(_inside(path, one.module) for one in script.imports)]
    words = f"none of the {len(targets)} targets that are sources is what the script imports"
    if near:
        return Reason("reach", "static", "open", f"{words}; {', '.join(near)} may be behind it", source)
    return Reason("reach", "static", "against", f"{words}, or lies in a package that it imports", source)


def _of_targets(script: Script, name: str, targets: list[str]) -> bool:
    """Whether a call is of something that lies in the same package as some target."""
    top = {part for path in targets for part in path.split("/")[:2]}
    return any(
        one.bound == name.split(".", maxsplit=1)[0] and one.module.split(".")[0] in top for one in script.imports
    )


def _inside(path: str, module: str) -> bool:
    folder = module.replace(".", "/")
    return path.startswith(f"{folder}/") or f"/{folder}/" in path


def _compiled(path: str) -> bool:
    return path.endswith(history.COMPILED)
